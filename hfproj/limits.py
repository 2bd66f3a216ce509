"""What a file that somebody else wrote may ask for: the one budget of opening an adapter, results or a checkpoint.

Opening a file of b bytes takes at most `MEMORY` + `COPIES` b bytes, and `SECONDS` + b / `PER_SECOND` seconds of one
processor, whether it is loaded or refused. The numbers below keep that: whatever a file holds that decides a size, a
count, a loop or a path is compared with one of them before memory is taken for it. `tests/faults` holds files made to
break it, in processes with that limit.
"""

MEMORY = 1 << 30
COPIES = 4  # of what the file really holds: read, cast to float32, put into modules
SECONDS = 15
PER_SECOND = 1 << 25

# JSON
CONFIG_BYTES = 1 << 20  # a real adapter_config.json has a few thousand
RESULTS_BYTES = 1 << 26  # results.json holds outcomes row by row
MODEL_CONFIG_BYTES = 1 << 23  # config.json of a backbone, which may name 22,000 classes
RESULTS_VALUES = 1 << 20
RESULTS_TEXT = 1 << 16  # letters of one text; a command with its options has some thousand
RESULTS_TEXTS = 1 << 20  # letters of all texts, each counted once: they are searched for secrets
RESULTS_ROWS = 1 << 25  # answers, right or wrong: 600 measures on 50,000 images
JSON_VALUES = 1 << 21  # values of one file: each takes some hundred bytes of memory
JSON_DEPTH = 32
INTEGER_DIGITS = 18  # so that an integer fits 64 bits

# Tensors
HEADER_BYTES = 1 << 23  # of a safetensors file; a full ViT-L has 40 thousand
TENSORS = 20_000  # a ViT-g trained in full has 1,000
DIMENSIONS = 8
PICKLE_BYTES = 1 << 24  # of a checkpoint without its tensors; training scripts save some hundred thousand
NESTED = 16  # dictionaries in dictionaries of a checkpoint

# Configurations
WIDTH = 1 << 20  # of a representation, a layer, a projection; 65,536 prototypes are the most that a paper has
LAYERS = 256  # linear layers of a head
RANK = 1 << 16
NUMBER = 1e6  # any other option, such as lora_alpha
PATTERN_STEPS = 300_000  # for matching one module's name
PATTERNS = 256  # entries of rank_pattern and alpha_pattern, each a regular expression that PEFT compiles
BACKBONE_BLOCKS = 1000
BACKBONE_MODULES = 30_000
UNBACKED_BYTES = 1 << 29  # of a backbone or of layers on it that a config asks for beyond what files hold
OBJECTIVE_BYTES = 1 << 31  # of queues and memories, made where training goes on: DeepCluster-v2 on ImageNet has 1.3 GB
PUBLISHED_BYTES = 1 << 33  # of a backbone under a published name: DINOv2's ViT-g has 4.5 GB

# Tables
HISTORY_BYTES = 1 << 26
HISTORY_COLUMNS = 2000
HISTORY_CELLS = 1 << 22
HISTORY_FOOTER = 1 << 20  # bytes; 2000 columns with names of 45 letters take 660 thousand
HISTORY_PAGES = 1 << 16
MEASUREMENTS = 10_000
