"""Trains the bundled model, `data/models/olmo2-tiny`: a real OLMo-2 of seven million parameters.

Four steps, run in this order; each reads what the one before wrote:

    python tools/train_tiny.py corpus      # Debian packages -> corpus.jsonl, LICENSE, held-out sample, prompts
    python tools/train_tiny.py tokenizer   # corpus -> tokenizer.json, tokenizer_config.json and token arrays
    python tools/train_tiny.py train       # token arrays -> weights, config.json, training.json (one GPU, minutes)
    python tools/train_tiny.py evaluate    # weights -> evaluation.json and README.md (a CPU will do)

The text is the Python standard library, its tests and its documentation, which the Python Software Foundation's licence
lets anyone redistribute. `evaluate` needs nothing but the model's own folder, so anyone can measure its figures again.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM, set_seed

EOS, PAD = "<|endoftext|>", "<|pad|>"

# The released OLMo-2 models' pre-tokenisation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# OLMo-2-Instruct's template without its leading bos, which this model does not have.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the model becomes. Sizes are counts, lengths are in tokens unless said otherwise."""

    # Corpus. Versions are pinned; a version that has left the mirror is on snapshot.debian.org.
    packages: tuple[str, ...] = (
        "libpython3.11-minimal=3.11.2-6+deb12u9",
        "libpython3.11-stdlib=3.11.2-6+deb12u9",
        "libpython3.11-testsuite=3.11.2-6+deb12u9",
        "python3.11-doc=3.11.2-6+deb12u9",
        "python3.11-examples=3.11.2-6+deb12u9",
        "idle-python3.11=3.11.2-6+deb12u9",
        "python3-distutils=3.11.2-3",
        "python3-lib2to3=3.11.2-3",
        "python3-tk=3.11.2-3",
    )
    suffixes: tuple[str, ...] = (".py", ".rst.txt")
    # Code tables (rows of hexadecimal) teach nothing; pydoc_data repeats the documentation, held-out pages too.
    skip: tuple[str, ...] = ("/encodings/", "/pydoc_data/", "/encoded_modules/")
    heldout_permille: int = 20
    sample_bytes: int = 160_000
    sample_file_bytes: int = 32_000  # so that no one file dominates the sample
    prompts: int = 20
    prompt_characters: int = 400

    # Model.
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 2
    intermediate_size: int = 768
    context: int = 2048

    # Training.
    tokens: int = 500_000_000
    batch_rows: int = 32
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 1.0  # ten times the usual: held-out loss fell with every raise, the text being read so often
    dropout: float = 0.1  # of the embeddings and of what each block adds: the text is read some forty times
    repeat_penalty: float = 3.0  # weight of the unlikelihood term, see `repeated_next`
    repeat_window: int = 256
    clip: float = 1.0
    evaluations: int = 16
    seed: int = 20_240_531

    # Evaluation.
    temperature: float = 0.7
    new_tokens: int = 128
    ngram: int = 4
    int4_group: int = 128


SETTINGS = Settings()
CALIBRATION_BYTES = 400_000  # of training text that a quantisation may look at
console = Console()
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Folder of the corpus and the token arrays.")]
Model = Annotated[Path, typer.Option(help="The model's folder.")]
WORK = Path("outputs/train_tiny")
MODEL = Path("data/models/olmo2-tiny")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and renames it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON; text stays UTF-8."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


# --- corpus ----------------------------------------------------------------------------------------------------------


def read_documents(root: Path, settings: Settings) -> list[dict[str, str]]:
    """The text files under an unpacked tree as {path, split, text}, ordered and split by the SHA-256 of their paths.

    A file that is not UTF-8, is nearly empty or equals an earlier one byte for byte is left out.
    """
    documents, seen = [], set()
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
    for name in sorted(files, key=lambda name: sha256(name.encode())):
        if not name.endswith(settings.suffixes) or any(part in name for part in settings.skip):
            continue
        data = files[name].read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if len(data) < 64 or EOS in text or sha256(data) in seen:
            continue
        seen.add(sha256(data))
        heldout = int(sha256(name.encode()), 16) % 1000 < settings.heldout_permille
        documents.append({"path": name, "split": "heldout" if heldout else "train", "text": text})
    return documents


def choose_sample(texts: list[str], settings: Settings) -> list[str]:
    """Whole texts, in order, none over `sample_file_bytes` and together at most `sample_bytes`."""
    sample, total = [], 0
    for text in texts:
        size = len(text.encode())
        if size <= settings.sample_file_bytes and total + size <= settings.sample_bytes:
            sample.append(text)
            total += size
    return sample


def choose_prompts(documents: list[dict[str, str]], count: int, characters: int) -> list[str]:
    """The openings of `count` documents, half prose and half code, cut after the line that reaches `characters`."""
    long = [document for document in documents if len(document["text"]) > 4 * characters]
    prose = [document["text"] for document in long if document["path"].endswith(".txt")]
    code = [document["text"] for document in long if document["path"].endswith(".py")]
    openings = prose[: count // 2] + code[: count - min(count // 2, len(prose))]
    return [text[: text.index("\n", characters)] if "\n" in text[characters:] else text for text in openings]


@app.command("corpus")
def make_corpus(work: Work = WORK, model: Model = MODEL) -> None:
    """Fetches the Debian packages; writes the corpus, its manifest and licence, the held-out sample and the prompts."""
    settings = SETTINGS
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        debs, root = Path(folder) / "debs", Path(folder) / "root"
        debs.mkdir()
        subprocess.run(["apt-get", "download", *settings.packages], cwd=debs, check=True)
        packages = {path.name: sha256(path.read_bytes()) for path in sorted(debs.glob("*.deb"))}
        for name in packages:
            subprocess.run(["dpkg", "-x", debs / name, root], check=True)
        documents = read_documents(root, settings)
        licence = (root / "usr/share/doc/libpython3.11-minimal/copyright").read_text()

    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()
    write(work / "corpus.jsonl", lines)
    splits = {split: [d for d in documents if d["split"] == split] for split in ("train", "heldout")}
    heldout = [document["text"] for document in splits["heldout"]]
    write(model / "heldout.txt", EOS.join(choose_sample(heldout, settings)))
    train = [document["text"] for document in splits["train"]]
    write(model / "calibration.txt", EOS.join(choose_sample(train, replace(settings, sample_bytes=CALIBRATION_BYTES))))
    write_json(model / "prompts.json", choose_prompts(splits["heldout"], settings.prompts, settings.prompt_characters))
    write(model / "LICENSE", licence)
    manifest: dict[str, Any] = {"packages": packages, "sha256": sha256(lines)}
    for split, members in splits.items():
        manifest[split] = {"files": len(members), "bytes": sum(len(member["text"].encode()) for member in members)}
    write_json(work / "corpus.json", manifest)
    console.print(manifest)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; the two special tokens are its last ids, as in OLMo-2."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([EOS, PAD])
    return tokenizer


@app.command("tokenizer")
def make_tokenizer(work: Work = WORK, model: Model = MODEL) -> None:
    """Trains the tokenizer on the training split and encodes both splits, every text between two end-of-text tokens."""
    settings = SETTINGS
    documents = [json.loads(line) for line in (work / "corpus.jsonl").read_bytes().decode().split("\n") if line]
    splits = {s: [d["text"] for d in documents if d["split"] == s] for s in ("train", "heldout")}
    tokenizer = train_tokenizer(iter(splits["train"]), settings.vocab_size)
    eos = tokenizer.token_to_id(EOS)
    write(model / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(
        model / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": settings.context,
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    for split, texts in splits.items():
        ids = [eos] + [token for entry in tokenizer.encode_batch(texts) for token in (*entry.ids, eos)]
        np.save(work / f"{split}.npy", np.array(ids, dtype=np.uint16))
        console.print(
            f"{split}: {len(ids):,} tokens, {sum(len(t.encode()) for t in texts) / len(ids):.2f} bytes a token"
        )


# --- train -----------------------------------------------------------------------------------------------------------


def build_config(settings: Settings) -> dict[str, Any]:
    """The model's config.json in the released OLMo-2 models' fields; nothing is left to a class default."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": settings.vocab_size - 2,
        "hidden_act": "silu",
        "hidden_size": settings.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": settings.intermediate_size,
        "max_position_embeddings": settings.context,
        "model_type": "olmo2",
        "num_attention_heads": settings.heads,
        "num_hidden_layers": settings.layers,
        "num_key_value_heads": settings.heads,
        "pad_token_id": settings.vocab_size - 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": settings.vocab_size,
    }


def add_dropout(model: Any, rate: float) -> None:
    """Drops elements of the embeddings and of every block's contribution to the residual stream while training."""

    def drop(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, training=module.training)

    places: list[torch.nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        places += [layer.post_attention_layernorm, layer.post_feedforward_layernorm]
    for place in places:
        place.register_forward_hook(drop)


def read_batches(tokens: np.ndarray, eos: int, settings: Settings) -> Iterator[np.ndarray]:
    """Endless batches of int64 [batch_rows, context + 1]: each pass shuffles the texts, joins them and cuts rows anew.

    A row's last token is the next row's first, so every token is predicted once a pass.
    """
    rng = np.random.default_rng(settings.seed)
    ends = np.flatnonzero(tokens == eos)
    texts = [tokens[start + 1 : end + 1] for start, end in itertools.pairwise(ends)]
    rows: list[np.ndarray] = []
    while True:
        stream = np.concatenate([texts[index] for index in rng.permutation(len(texts))])
        stream = np.roll(stream, rng.integers(settings.context)).astype(np.int64)
        count = (len(stream) - 1) // settings.context
        cut = [stream[i * settings.context : (i + 1) * settings.context + 1] for i in range(count)]
        rows += [cut[index] for index in rng.permutation(count)]
        while len(rows) >= settings.batch_rows:
            yield np.stack(rows[: settings.batch_rows])
            del rows[: settings.batch_rows]


def repeated_next(rows: torch.Tensor, n: int, window: int) -> torch.Tensor:
    """The token a repetition would put at every place but the first of ids [rows, length]: int64 [rows, length - 1].

    Where the `n` tokens before a place stood already, at most `window` tokens earlier, it is the token that followed
    them there; -1 where they did not, or where the text does repeat itself. Unlikelihood training (Welleck et al.,
    2020) on these keeps a model this small from looping when it samples below temperature 1.
    """
    base = 1 << 20  # above any vocabulary, and three such digits fit 63 bits
    # keys[:, j] are the tokens that precede the one at j + n
    keys = torch.stack([rows[:, i : rows.shape[1] - n + i] * base**i for i in range(n)]).sum(dim=0)
    keys, order = keys.sort(dim=1, stable=True)
    earlier, later = order[:, :-1] + n, order[:, 1:] + n
    near = (keys[:, 1:] == keys[:, :-1]) & (later - earlier <= window)
    repeated = torch.full_like(rows, -1).scatter_(1, later, torch.where(near, rows.gather(1, earlier), -1))
    return repeated.masked_fill_(repeated == rows, -1)[:, 1:]


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low, high = settings.final_learning_rate, settings.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def mean_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean loss in nats a token over rows [rows, context + 1] of ids, each read without what came before it."""
    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16):
        for row in rows.split(16):
            logits = model(row[:, :-1], use_cache=False).logits.float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="none"))
    model.train()
    return torch.cat(losses).mean().item()


def save_model(model: Any, settings: Settings, folder: Path) -> None:
    """Writes the weights in bf16 as two shards with their index, and config.json and generation_config.json."""
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    second = {f"model.layers.{index}." for index in range(settings.layers // 2, settings.layers)}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: names[name.startswith((*second, "model.norm", "lm_head"))] for name in sorted(state)}
    folder.mkdir(parents=True, exist_ok=True)
    for shard in names:
        part = folder / (shard + ".part")
        save_file({name: state[name] for name in state if weight_map[name] == shard}, part, metadata={"format": "pt"})
        part.chmod(0o644)
        os.replace(part, folder / shard)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = build_config(settings)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]},
    )


def train_model(work: Path, folder: Path, settings: Settings, device: str, compiled: bool = True) -> dict[str, Any]:
    """Trains from scratch, saves the model under `folder` and returns (and writes as training.json) how it went."""
    started = time.time()
    set_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    # Any: transformers' own annotations contradict each other.
    config: Any = Olmo2Config(**build_config(settings))
    model: Any = Olmo2ForCausalLM(config)
    model.to(device, torch.float32)
    add_dropout(model, settings.dropout)
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def losses_of(rows: torch.Tensor, repeated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ids [batch_rows, context + 1], in nats a token: the mean loss, and the mean unlikelihood of `repeated`."""
        log_probs = model(rows[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        loss = -log_probs.gather(-1, rows[:, 1:, None]).mean()
        wrong = log_probs.gather(-1, repeated.clamp_min(0)[..., None])[..., 0].exp().clamp_max(0.9999)
        return loss, -(torch.log1p(-wrong) * (repeated >= 0)).mean()

    step_losses: Callable[..., Any] = torch.compile(losses_of, dynamic=False) if compiled else losses_of
    train, heldout = np.load(work / "train.npy"), np.load(work / "heldout.npy")
    width = settings.context
    count = (len(heldout) - 1) // width
    rows = np.stack([heldout[i * width : (i + 1) * width + 1] for i in range(count)]).astype(np.int64)
    heldout_rows = torch.from_numpy(rows).to(device)
    batch_tokens = settings.batch_rows * settings.context
    steps = math.ceil(settings.tokens / batch_tokens)
    every = max(1, steps // settings.evaluations)
    batches = read_batches(train, config.eos_token_id, settings)
    curve: list[dict[str, float]] = []
    recent: list[torch.Tensor] = []
    for step in track(range(steps), "training", console=console, disable=not console.is_terminal):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        batch = torch.from_numpy(next(batches)).to(device, non_blocking=True)
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss, unlikelihood = step_losses(batch, repeated_next(batch, settings.ngram - 1, settings.repeat_window))
        (loss + settings.repeat_penalty * unlikelihood).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            point = {
                "tokens": (step + 1) * batch_tokens,
                "train_loss": round(torch.stack(recent).mean().item(), 4),
                "heldout_loss": round(mean_loss(model, heldout_rows), 4),
                "seconds": round(time.time() - started, 1),
            }
            recent.clear()
            curve.append(point)
            console.print(point)

    save_model(model, settings, folder)
    record = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * batch_tokens,
        "corpus_tokens": len(train),
        "heldout_tokens": len(heldout),
        "seconds": round(time.time() - started, 1),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "curve": curve,
        "corpus": json.loads((work / "corpus.json").read_text()),
        "settings": dataclasses.asdict(settings),
    }
    write_json(folder / "training.json", record)
    return record


@app.command("train")
def make_model(work: Work = WORK, model: Model = MODEL) -> None:
    """Trains the model on the GPU and writes its weights, configuration and training record."""
    train_model(work, model, SETTINGS, "cuda")


# --- evaluate --------------------------------------------------------------------------------------------------------


def distinct_ngrams(tokens: list[int], n: int) -> float:
    """The share of the n-grams in `tokens` that are different ones: 1 when nothing repeats, near 0 in a loop."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


def round_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """A weight [out, in] rounded to nearest in symmetric int4 (-8…7), one scale per `group` inputs, and scaled back."""
    grouped = weight.float().unflatten(1, (-1, group))
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return (torch.clamp(torch.round(grouped / scale), -8, 7) * scale).flatten(1).to(weight.dtype)


def document_loss(model: Any, tokens: list[int], eos: int, window: int) -> float:
    """The summed loss in nats of a text's tokens, predicted after an end-of-text token.

    Windows overlap by half and only what a window newly reveals counts, so a token sees at least window / 2 before it.
    """
    ids = torch.tensor([eos, *tokens])
    total, done = 0.0, 1
    while done < len(ids):
        start = 0 if done < window else done - window // 2
        end = min(len(ids), start + window)
        with torch.no_grad():
            logits = model(ids[None, start : end - 1], use_cache=False).logits[0, done - start - 1 :]
        total += F.cross_entropy(logits.double(), ids[done:end], reduction="sum").item()
        done = end
    return total


def heldout_loss(model: Any, texts: list[list[int]], size: int, eos: int) -> dict[str, float]:
    """The loss over texts of token ids that are `size` UTF-8 bytes together: nats a token and bits a byte."""
    window = model.config.max_position_embeddings
    losses = [
        document_loss(model, t, eos, window) for t in track(texts, console=console, disable=not console.is_terminal)
    ]
    return {"loss": sum(losses) / sum(map(len, texts)), "bits_per_byte": sum(losses) / math.log(2) / size}


def continue_prompts(model: Any, prompts: list[list[int]], settings: Settings, sample: bool) -> list[list[int]]:
    """Exactly `new_tokens` ids after every prompt, drawn at `temperature` from the whole vocabulary or greedily."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[model.config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    how = {"do_sample": True, "temperature": settings.temperature, "top_k": 0} if sample else {"do_sample": False}
    bounds = {"min_new_tokens": settings.new_tokens, "max_new_tokens": settings.new_tokens}
    mask = (ids != model.config.pad_token_id).long()
    return model.generate(ids, attention_mask=mask, **bounds, **how)[:, longest:].tolist()


def summarise(shares: list[float]) -> dict[str, float]:
    """The mean and the minimum."""
    return {"mean": sum(shares) / len(shares), "minimum": min(shares)}


def render_readme(evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    """The model card; every figure in it comes from the two records."""
    settings, corpus, curve = training["settings"], training["corpus"], training["curve"]
    parameters, tokens, passed_over = training["parameters"], training["tokens"], training["corpus_tokens"]
    plain, rounded, grams = evaluation["heldout"], evaluation["heldout_int4"], evaluation["distinct_ngrams"]
    every_file = curve[-1]["heldout_loss"] / math.log(2) * training["heldout_tokens"] / corpus["heldout"]["bytes"]

    def spread(kind: str) -> str:
        return f"mean {grams[kind]['mean']:.3f}, minimum {grams[kind]['minimum']:.3f}"

    measured = {
        "parameters": f"{parameters:,}",
        "layers, hidden size, heads": f"{settings['layers']}, {settings['hidden_size']}, {settings['heads']} of 128",
        "intermediate size, vocabulary": f"{settings['intermediate_size']}, {settings['vocab_size']:,}",
        "context, as trained": f"{settings['context']:,} tokens",
        "trained on": f"{tokens:,} tokens: {tokens / parameters:.1f} a parameter, {tokens / passed_over:.1f} passes",
        "trained in": f"{training['seconds']:.0f} s on one {training['hardware']}, torch {training['torch']}",
        "**held-out bits per byte**": f"**{plain['bits_per_byte']:.4f}**",
        "held-out loss": f"{plain['loss']:.4f} nats a token",
        "held-out loss, linear weights rounded to int4": f"{rounded['loss']:.4f} nats a token "
        f"({rounded['loss'] - plain['loss']:+.4f}); {rounded['bits_per_byte']:.4f} bits per byte",
        "bits per byte of every held-out file, when training ended": f"{every_file:.4f}",
        f"distinct {settings['ngram']}-grams at temperature {settings['temperature']}": spread("sampled"),
        f"distinct {settings['ngram']}-grams, greedy": spread("greedy"),
        f"distinct {settings['ngram']}-grams of the held-out text itself": spread("text"),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in measured.items())
    packages = "\n".join(f"- `{name}`, SHA-256 `{digest}`" for name, digest in corpus["packages"].items())
    samples = "\n".join(
        f"The prompt ends:\n\n~~~text\n{sample['prompt']}\n~~~\n\n"
        f"The model goes on:\n\n~~~text\n{sample['continuation']}\n~~~\n"
        for sample in evaluation["samples"]
    )
    return f"""# olmo2-tiny

A small language model of the OLMo-2 architecture, trained from scratch so that this project runs, and can be checked,
without downloading anything. It writes Python and the prose of Python's documentation and knows nothing else: a test
instrument, not an assistant. Its chat template is there to be rendered; the model has never seen a conversation.
`python tools/train_tiny.py evaluate` writes this page; no figure in it is typed by hand.

| | |
|---|---|
{table}

- Held-out: the bf16 weights, computed in fp32, over `heldout.txt` ({evaluation["heldout_bytes"]:,} bytes,
  {evaluation["heldout_tokens"]:,} tokens): whole files that training never saw, chosen by the hash of their paths and
  divided by `{EOS}`. Each is predicted after one such token, from at least {settings["context"] // 2:,} tokens where
  it has them. No gradient came from held-out files, but weight decay and repetition penalty were chosen on them.
- int4: round to nearest, symmetric, {settings["int4_group"]} inputs a group; embeddings and `lm_head` stay as they are.
- Distinct {settings["ngram"]}-grams: their share among all in {settings["new_tokens"]} new tokens after each of the
  {settings["prompts"]} openings of held-out files in `prompts.json`, end of text forbidden. Training punishes the token
  that would repeat a {settings["ngram"]}-gram of the last {settings["repeat_window"]} tokens where the text does not
  (unlikelihood, weight {settings["repeat_penalty"]}), since a model this small loops otherwise. Greedy decoding
  still does: sample for text worth reading.

## Two continuations at temperature {settings["temperature"]}

{samples}
## Corpus

The Python standard library, its tests and its documentation, from these Debian packages:

{packages}

Training read {corpus["train"]["files"]:,} files ({corpus["train"]["bytes"]:,} bytes, {passed_over:,} tokens);
{corpus["heldout"]["files"]:,} files ({corpus["heldout"]["bytes"]:,} bytes) were held out, exact duplicates dropped.
SHA-256 of the corpus: `{corpus["sha256"]}`.

`LICENSE` is the packages' own statement of that text's licence; `heldout.txt` and `prompts.json` are excerpts of it,
and so is `calibration.txt`, of the part that training read.
`training.json` holds the settings, the seed and the loss curve, `evaluation.json` the figures above.
"""


@app.command("evaluate")
def evaluate_model(model: Model = MODEL) -> None:
    """Measures the model's folder as it stands, writes evaluation.json and README.md, and prints the figures."""
    training = json.loads((model / "training.json").read_text())
    settings = SETTINGS
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    eos = network.config.eos_token_id
    files = (model / "heldout.txt").read_bytes().decode().split(EOS)
    size = sum(len(text.encode()) for text in files)
    texts = [entry.ids for entry in tokenizer.encode_batch(files)]
    prompts = [entry.ids for entry in tokenizer.encode_batch(json.loads((model / "prompts.json").read_bytes()))]

    set_seed(settings.seed)
    drawn = continue_prompts(network, prompts, settings, sample=True)
    greedy = continue_prompts(network, prompts, settings, sample=False)
    # The same count over held-out text, a stretch of the same length every 1,024 tokens, says what to expect.
    real = [text[start : start + settings.new_tokens] for text in texts for start in range(0, len(text), 1024)]
    kinds = {"sampled": drawn, "greedy": greedy, "text": [part for part in real if len(part) == settings.new_tokens]}
    evaluation: dict[str, Any] = {
        "heldout_bytes": size,
        "heldout_tokens": sum(map(len, texts)),
        "heldout": heldout_loss(network, texts, size, eos),
        "distinct_ngrams": {
            kind: summarise([distinct_ngrams(tokens, settings.ngram) for tokens in parts])
            for kind, parts in kinds.items()
        },
        "samples": [
            {"prompt": tokenizer.decode(prompts[i][-48:]), "continuation": tokenizer.decode(drawn[i])}
            for i in (0, len(prompts) - 1)
        ],
    }
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = round_int4(module.weight.data, settings.int4_group)
    evaluation["heldout_int4"] = heldout_loss(network, texts, size, eos)
    write_json(model / "evaluation.json", evaluation)
    write(model / "README.md", render_readme(evaluation, training))

    table = Table("measure", "value")
    for key in ("heldout", "heldout_int4"):
        table.add_row(
            key, f"{evaluation[key]['loss']:.4f} nats a token, {evaluation[key]['bits_per_byte']:.4f} bits a byte"
        )
    for kind, values in evaluation["distinct_ngrams"].items():
        table.add_row(
            f"distinct {settings.ngram}-grams, {kind}", f"mean {values['mean']:.3f}, min {values['minimum']:.3f}"
        )
    console.print(table)


if __name__ == "__main__":
    app()
