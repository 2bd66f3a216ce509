"""The files of an adapter's folder, and of its repository on the Hub.

One adapter lies in the root; of several, as PEFT has it, "default" does, and each other one in a folder of its name.
"""

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

ADAPTER_CONFIG = CONFIG_NAME  # adapter_config.json
ADAPTER_WEIGHTS = SAFETENSORS_WEIGHTS_NAME  # adapter_model.safetensors: head, predictor, prototypes, backbone part
CARD = "README.md"
RESULTS = "results.json"
PREPROCESSING = "preprocessor_config.json"  # as transformers' image processors have it
OBJECTIVE = "objective.safetensors"  # the objective's buffers (queues, centres), step and epoch
EMA = "ema.safetensors"  # the EMA teacher
PICTURE = "spectrum.png"
TRAINING_PICTURE = "training.png"  # loss and diagnostics while it trained
# Of the user's own images or texts: they stay on this machine, on the page, and are neither pushed nor on the card.
VIEWS = "views.png"
NEIGHBOURS = "neighbours.png"
MAP = "map.png"
TEXT_NEIGHBOURS = "neighbours.json"
OF_IMAGES = (VIEWS, NEIGHBOURS, MAP)
OF_OWN_DATA = (*OF_IMAGES, TEXT_NEIGHBOURS)
EVAL_RESULTS = ".eval_results"  # folder of the Hub's newer form of evaluation results
