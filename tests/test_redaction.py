"""Secrets in what is kept: command lines, results, cards, pages."""

import sys
import time

import pytest

import hfproj
from hfproj.files import command_line, portable
from hfproj.redaction import is_secret, known_secrets, redact, redact_words, redacted, remember, secrets_in
from hfproj.reporting import render_card, render_report

A, HASH = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6", "4ab9f2c0a5d4ab9f2c0a5d4ab9f2c0a5d1234567"
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{A}"
PRIVATE = f"-----BEGIN RSA PRIVATE KEY-----\n{A}\n-----END RSA PRIVATE KEY-----"

NAMED = [
    "token", "hub_token", "hf_token", "wandb_api_key", "api_key", "apikey", "hubToken", "comet_api_key", "password",
    "neptune_api_token", "db_password", "passwd", "aws_secret_access_key", "aws_session_token", "client_secret",
    "mlflow_tracking_password", "secret", "private_key", "access_key", "wandb_key", "license_key", "our_company_token",
    "trackers.wandb.api_key", "auth_token", "encryption_key", "storage_key", "api-key", "accessToken", "passphrase",
    "aws_access_key_id", "connection_string", "sshpass", "db_pass", "credentials", "api_keys", "hub_tok", "gh_pat",
    "db_pw", "pw", "secret_key_base", "creds", "otp", "smtppass", "PGPASSWORD",
    "dbpassword", "clientsecret", "mypwd", "API_TOKEN_V2", "TOKEN_PROD",
]  # fmt: skip
FORMS = ["--{n} {v}", "--{n}={v}", "--options {n}={v},epochs=3", '--options \'{{"{n}": "{v}"}}\'', "+{n}={v}"]
VALUES = ["enterprise-value-xyz", "0123456789abcdef", "Tr0ub4dor&3", HASH]
SHAPES = [
    f"hf_{A}", f"api_org_{A}", f"ghp_{A}", f"github_pat_{A}", f"glpat-{A}", f"sk-{A}", f"sk-proj-{A}-x_y", JWT, PRIVATE,
    f"sk-ant-api03-{A}", "AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE", "AIza" + "Sy_0" * 8 + "abc", f"xoxb-{A}",
    f"gsk_{A}", f"r8_{A}", f"npm_{A}", f"pypi-AgEI{A}", f"ya29.{A}",
    "eyJhcGlfYWRkcmVzcyI6Imh0dHBzOi8vYXBwLm5lcHR1bmUiOiJhIn0=",
    f"dckr_pat_{A}", f"https://discord.com/api/webhooks/123456789012345678/{A}{A}",
    f"https://hooks.slack.com/services/T00000000/B00000000/{A}",
]  # fmt: skip
URLS = [
    "https://user:{v}@host/x", "s3://AKIAXYZ:{v}@bucket/path", "postgresql+psycopg2://me:{v}@db:5432/x", "redis://:{v}@h",
    "http://{v}@host", "git+https://me:{v}@github.com/a/b", "https://host/x?token={v}&y=1", "mongodb://u:{v}@h/?x=1",
    "https://host/x?api_key={v}", "s3://key:ab/{v}+cd@bucket",
]  # fmt: skip

# Where the words around it say that a value is a secret.
LINES = [
    "docker login -u me -p {v}", "sshpass -p {v} ssh h", "sshpass -p{v} ssh h", "mysql -u root -p{v} db",
    "redis-cli -a {v}", "/usr/bin/mysqldump -p'{v}' db", "curl -u user:{v} https://h/x",
    "curl -s --user me:{v} https://h", "curl --user=me:{v} h", "helm registry login -p {v} h", "a.py --pat {v}",
    "a.py --tok {v}", "run pw={v}", "a.py --tokens {v},{v}b", "tokens={v},{v}", "a.py --api_keys={v},{v}",
    "a.py --session_id {v}", "a.py --http_proxy me:{v}@proxy:8080", "https_proxy=me:{v}@p a.py",
    "a.py --proxy-user me:{v}", "a.py --user me:{v}", "ftp://{v}@host", "rsync me:{v}@host::mod", "a.py --login {v}",
    "a.py --vault {v}", "a.py --hub_token\\={v}", "a.py --hub_token $'{v}'", "a.py --hub_token=$'{v}'",
    "a.py --hub_token\t{v}", "a.py --password my\\ {v}\\ word", "a.py password=my\\ {v}", "a.py --password {v},more",
    "a.py --auth me:{v}",
]  # fmt: skip

ORDINARY = f"""
recipes/simclr_vit.py --epochs 3 --output_dir out/run --objective nt_xent --temperature 0.2
recipes/simclr_vit.py --revision {HASH} --metric_for_best_model eval_knn --image_key image --label_key fine_label
recipes/simclr_vit.py --tokenizer bert-base-uncased --num_tokens 512 --max_tokens 77 --pad_token [PAD] --eos_token </s>
recipes/simclr_vit.py --continue_from repo=me/digits,revision={HASH[:12]},adapter=b --hub_model_id me/digits-simclr
recipes/simclr_vit.py --hub_token $HF_TOKEN --push_to_hub me/x --hub_private_repo true
recipes/probe.py --head_options '{{"hidden_dim": 512, "key": "value", "depth": 3}}' --views crop=0.2,flip=false
recipes/probe.py --dataset uoft-cs/cifar10 --text_key caption --cache_key 3f2a4b5c6d7e8f90 --sort_key step --key image
recipes/probe.py --use_auth_token true --token true --class_token false --reg_tokens 4 --mask_token zero --pool token
recipes/convert.py --checkpoint vit_small_patch14_reg4_dinov2.lvd142m.pth --method dinov2 --num_heads 6
recipes/probe.py --url https://huggingface.co/facebook/dinov2-small --endpoint http://localhost:5000/repo@main
recipes/probe.py --repo git@github.com:me/x --image docker://img:tag@sha256:{HASH} --base ssh://git@host/x
recipes/probe.py --target_modules query,key,value --num_key_value_heads 4 --password_file ./p --monkey 3 --keyboard us
recipes/probe.py --token_type_ids 0 --tokens_per_image 196 --keypoints 17 --secret_length 5 --projection_prng_key 3
recipes/probe.py --compass north --secret_santa Bob12345 --bypass yes12345x --lowpass a1b2c3d4e5 --pw_conv 64x64x64x64
recipes/probe.py --tokens the,cat,sat --login octocat --session_id 20250102 --user me:staff --proxy proxy:8080
docker run -p 8080:80 -u 1000:1000 img:2025.01.02-rc1 && curl -u me https://h && mysql -p digits --user 1000:1000
recipes/probe.py --pat 5 --patience 10 --tok_embeddings 12ab34cd56ef --vault_dir a1b2c3d4e5f6 --x me:latest@main
recipes/probe.py --user_key u1234567x --http_proxy http://proxy:8080 --ftp ftp://anonymous@host --x token=true,a
""".split("\n")[1:-1]


OTHERS = [
    "curl -sSu me:{v} https://h/x", "wandb login {v}", "aws configure set aws_secret_access_key {v}", "//me:{v}@host/x",
    "https:\\/\\/me:{v}@host\\/x", "u=https%3A%2F%2Fme%3A{v}%40host%2Fx",
]  # fmt: skip
TOKENS = [
    f"hvs.{A}", "dapi" + "0a" * 16, f"glsa_{A}", "shpat_" + "0a" * 16, f"lin_api_{A}", "sbp_" + "0a" * 20, f"_hf_{A}",
]  # fmt: skip


@pytest.mark.parametrize("line", OTHERS)
def test_other_places_of_credentials(line):
    value = "Zq8xW2vN5tR7yU1kZq8xW2vN5tR7yU1k"
    assert value not in redact(line.format(v=value), {})


@pytest.mark.parametrize("token", TOKENS)
def test_other_tokens(token):
    assert token.lstrip("_") not in redact(f"runs/x_{token} y", {})


def test_further_values_behind_a_flag():
    words = ["a.py", "--api_keys", "one-Zq8xW2vN5", "two-Zq8xW2vN5", "--train", "data/train", "x-Zq8xW2vN5"]
    assert redact_words(words, {}) == [
        "a.py", "--api_keys", "$API_KEYS", "$API_KEYS", "--train", "data/train", "x-Zq8xW2vN5",
    ]  # fmt: skip


def test_a_known_value_within_a_name(monkeypatch):
    """Names of runs and folders are joined with underscores; an ordinary word counts where it stands alone."""
    monkeypatch.setenv("WANDB_API_KEY", "Zq8xW2vN5tR7kLm5")
    monkeypatch.setenv("API_TOKENS", "one-Zq8xW2vN5,two-Zq8xW2vN5")
    monkeypatch.setenv("DB_PASSWORD", "p@ss/w0rd!x9")
    known = known_secrets()
    for text in (
        "run_Zq8xW2vN5tR7kLm5", "Zq8xW2vN5tR7kLm5_1", "x two-Zq8xW2vN5 y", "u=p%40ss/w0rd%21x9", "u=p%40ss%2fw0rd%21x9",
    ):  # fmt: skip
        found = redact(text, known)
        assert "Zq8xW2vN5" not in found
        assert "w0rd" not in found


def test_structures_of_secrets():
    value = "Zq8xW2vN5tR7"
    given = {"password": {"value": value}, "api_keys": (value,), "client": [("token", value)]}
    given["x"] = {"image_key": "img"}
    assert value not in str(redacted(given))
    assert redacted(given)["x"] == {"image_key": "img"}


@pytest.mark.parametrize("form", [*FORMS, "env {n}={v} python"])
@pytest.mark.parametrize("name", NAMED)
def test_values_of_arguments_by_name(name, form):
    for value in VALUES:
        said = redact(form.format(n=name, v=value))
        assert value not in said
        assert "$" in said
        assert name in said
        assert redact(said) == said
        if "'" not in form:
            assert value not in command_line(["a.py", *form.format(n=name, v=value).split()])


@pytest.mark.parametrize("secret", SHAPES)
def test_secrets_by_their_form(secret):
    for text in (secret, f"with {secret} in it", f"x={secret},y=1", f'["{secret}"]', f"https://h/{secret}/x"):
        said = redact(text)
        assert secret not in said
        assert secret[10:] not in said
        assert list(secrets_in(text, {}))
        assert not list(secrets_in(said, {}))


@pytest.mark.parametrize("url", URLS)
def test_credentials_in_urls(url):
    for value in ("Tr0ub4dor3x", "p%40ss-w0rd", A):
        said = redact(url.format(v=value))
        assert value not in said
        assert redact(said) == said


@pytest.mark.parametrize("line", LINES)
def test_secrets_by_the_words_around_them(line):
    for value in (A, "Zq8xW2vN5tR7yU1k"):
        said = redact(line.format(v=value))
        assert value not in said
        assert redact(said) == said
        if not set("'\\\t") & set(line):
            assert value not in command_line(line.format(v=value).split())


def test_the_whole_value_goes():
    assert redact(r"a.py --password my\ pass\ word1 --x 3") == "a.py --password $PASSWORD --x 3"
    assert redact("a.py --otp 123456 --pin 3") == "a.py --otp $OTP --pin 3"
    assert redact("docker login -u me -p Zq8x; ls -p x") == "docker login -u me -p $PASSWORD; ls -p x"
    assert redact("see me:Zq8xW2vN5tR7@host/x") == "see me:$CREDENTIALS@host/x"


@pytest.mark.parametrize("command", ORDINARY)
def test_ordinary_commands_stay_as_they_are(command):
    assert redact(command) == command
    assert portable(command) == command
    assert not list(secrets_in(command, {}))


PATTERNS = [
    "a=", "a:", "https://a:b:/", "auth=$", "-a ", "/a ", "f", "eyJaaaaaaa-", "https://", "a://:", "mysql ", "-p ",
    "curl -u ", "key: a ", "me:x@", "token=", "token=$", "token=true,", "key=a,a", "ab=cd;", "a@", "authorization:a ",
    "x ", '"a":"b",', "password:\\ ", "sk-", "a.", "~", "docker login ", "docker ", "ftp://", "-----BEGIN ", "<",
    "key='a ", "bearer ", "\\",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_time_is_linear(pattern):
    """Per letter it may take 12 µs: five times of what is measured; a search to the end from each takes a hundred."""
    text = (pattern * 40_000)[:40_000]
    started = time.process_time()
    portable(text)
    assert time.process_time() - started < 40_000 * 12e-6


def test_values_of_the_environment_and_of_the_command_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", HASH)
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setattr(sys, "argv", ["a.py", "--hub_token", "enterprise-xyz-1", "--x", "repo=a,token=another-xyz-2"])
    assert redact(f"failed with {HASH}, enterprise-xyz-1 and another-xyz-2") == (
        "failed with $WANDB_API_KEY, $HF_TOKEN and $HF_TOKEN"
    )
    assert redact("a short word") == "a short word"
    remember("passed-token-3")
    assert redact("with passed-token-3") == "with $HF_TOKEN"
    assert "passed-token-3" in known_secrets()


def test_names_with_values_that_are_none():
    for name, value in (("token", True), ("token", None), ("num_tokens", 5), ("seed", 12345), ("token", "true"),
                        ("pooling", "cls"), ("user", "me"), ("proxy", "proxy:8080"), ("password", ""),
                        ("use_auth_token", "$HF_TOKEN"), (3, "x")):  # fmt: skip
        assert not is_secret(name, value)
    assert is_secret("password", 12345678)


def test_nothing_is_left_in_results_card_and_page(tmp_path):
    secret, url = "enterprise-token-xyz", "https://me:Tr0ub4dor3@host/x"
    config = {
        "recipe": {"hub_token": secret, "continue_from": f"repo=a,token={secret}", "report_to": "wandb", "url": url},
        "training": {"wandb_key": secret, "trackers": [{"api_key": secret}], "argv": ["--db_password", secret]},
        "base_model": "me/vit", "path": "file:///home/someone", "adapter": {"head": "mlp"},
    }  # fmt: skip
    results = hfproj.Results(
        config=config, command=f"a.py --hub_token {secret} --url {url}", notes=[f"token={secret}", f"see {url}"],
        log=[{"error": f"Bearer {A}"}], missing=[hfproj.results.Missing("knn", "h", "after", f"api_key={secret}")],
        geometry={"collapse": {"cause": f"password: {secret}", "step": 3}},
    )  # fmt: skip
    kept = results.save(tmp_path).read_text()
    for text in (kept, render_card(results), render_report(results), repr(redacted(results))):
        for hidden in (secret, "Tr0ub4dor3", A):
            assert hidden not in text
    assert "someone" not in kept
    assert portable("file:///home/someone/data/a.tar and data:/home/someone/b") == "./a.tar and data:./b"
    assert [portable(p) for p in ("/home/someone", "/Users/someone/", r"C:\Users\someone", "/root")] == ["~"] * 4
