"""Files beside `tokenizer.json`, and what they say: added and special tokens, the chat template.

They are merged as transformers merges them. Where its versions 4 and 5 do different things with what a file says, and
`tokenizer.json` does not settle it, the file is refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Classes that, in transformers 4, put bos and eos around a text by their own options, whatever tokenizer.json says.
_OWN_TEMPLATE = re.compile(r"(Code)?Llama|Gemma|Cohere|GPTNeoX")


class TokenizerError(ValueError):
    """Tokenizer files that are absent or unusable, text that cannot be encoded, or a chat template's complaint."""


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens, as `read_special_tokens` found them."""

    named: dict[str, str]  # text by name: bos_token, eos_token, … and a model's own ones, as image_token
    tokens: list[AddedToken]  # to be added to tokenizer.json's, in this order; those it has get these flags
    ids: dict[str, tuple[int, Path]]  # id by text, and the file that says so


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        TokenizerError: The file holds something else.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_special_tokens(directory: Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> SpecialTokens:
    """Special tokens of a checkpoint folder, from `config` (its tokenizer_config.json) and, where that has no
    `added_tokens_decoder`, from special_tokens_map.json and added_tokens.json.

    Raises:
        TokenizerError: A file does not have the form that it must have.
    """
    config_path = directory / "tokenizer_config.json"
    named, extra = _named_and_extra(config, config_path)
    present = tokenizer.get_added_tokens_decoder()
    listed: dict[int, AddedToken] = {}
    ids: dict[str, tuple[int, Path]] = {}
    if (decoder := config.get("added_tokens_decoder")) is not None:
        if not isinstance(decoder, dict):
            raise TokenizerError(f"{config_path}: added_tokens_decoder is a {type(decoder).__name__}, not an object")
        for index, token in decoder.items():
            added = _added(token, config_path)
            ids[added.content] = _index(index, config_path), config_path
            listed[ids[added.content][0]] = added
    else:
        map_path, added_path = directory / "special_tokens_map.json", directory / "added_tokens.json"
        others, more = _named_and_extra(read_object(map_path), map_path)
        named, extra = named | others, [*extra, *more]
        special = {_content(token, config_path) for token in [*named.values(), *extra]}
        for text, index in read_object(added_path).items():
            ids[text] = _index(index, added_path), added_path
            listed[ids[text][0]] = AddedToken(text, normalized=text not in special, special=text in special)
        listed |= present
    contents = {name: _content(token, config_path) for name, token in named.items()}
    for token in listed.values():
        token.special = token.special or token.content in contents.values()
    known = {token.content for token in [*present.values(), *listed.values()]}
    tokens = [token for _, token in sorted(listed.items(), key=lambda item: item[0])]
    for token in [*named.values(), *extra]:
        if (content := _content(token, config_path)) not in known:
            known.add(content)
            tokens.append(_added(token, config_path, special=True))
    return SpecialTokens(contents, tokens, ids)


def added_around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that tokenizer.json puts before a text and behind it."""
    found = tokenizer.encode("a")
    marks = found.special_tokens_mask
    begin = next((place for place, mark in enumerate(marks) if not mark), len(marks))
    end = next((place for place in range(len(marks), begin, -1) if not marks[place - 1]), begin)
    return found.ids[:begin], found.ids[end:]


def check_agreement(
    directory: Path, config: dict[str, Any], named: dict[str, str], tokenizer: tokenizers.Tokenizer
) -> None:
    """Compare options of tokenizer_config.json that transformers 4 follows, and 5 does not, with tokenizer.json.

    Raises:
        TokenizerError: They say different things.
    """
    name = str(config.get("tokenizer_class"))
    pre = json.loads(tokenizer.pre_tokenizer.__getstate__()) if tokenizer.pre_tokenizer else {}
    checked = {}
    if own := _OWN_TEMPLATE.match(name):
        before, after = added_around(tokenizer)
        for option, token, around in (("add_bos_token", "bos_token", before), ("add_eos_token", "eos_token", after)):
            checked[option] = tokenizer.token_to_id(named[token]) in around if token in named else bool(around)
    if own or pre.get("type") == "ByteLevel":
        first = tokenizer.encode("a", add_special_tokens=False).tokens
        checked["add_prefix_space"] = bool(first) and first[0][0] in "▁Ġ"
    for option, does in checked.items():
        if isinstance(wanted := config.get(option), bool) and wanted != does:
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'}: {option} is {str(wanted).lower()} for {name}, but "
                f"tokenizer.json does {'so' if does else 'not do so'}; versions of transformers differ in which "
                "of the two they follow: make both say the same"
            )


def chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The folder's chat template; None where it has none."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _named_and_extra(settings: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Special tokens by name (the usual names, and whatever else ends in _token), and those without one."""
    usual = {name: settings[name] for name in SPECIAL_NAMES if settings.get(name) is not None}
    own = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str | dict)}
    extra = settings.get("extra_special_tokens")
    if extra is None:
        extra = settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TokenizerError(f"{path}: extra_special_tokens = {extra!r:.80}; it must be a list or an object of tokens")
    return (usual | own | extra, []) if isinstance(extra, dict) else (usual | own, extra)


def _index(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TokenizerError(f"{path}: {value!r:.80} is not the id of a token") from None


def _added(token: Any, path: Path, special: bool = False) -> AddedToken:
    """A token as files write it: its text, or an object of text and flags. special: also where it does not say so."""
    flags = {name: token[name] for name in _FLAGS if name in token} if isinstance(token, dict) else {}
    if not all(isinstance(value, bool) for value in flags.values()):
        raise TokenizerError(f"{path}: {token!r:.200}: {', '.join(_FLAGS)} must be true or false")
    return AddedToken(_content(token, path), **flags | ({"special": True} if special else {}))


def _content(token: Any, path: Path) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{path}: {token!r:.80} is not a token; it must be a text, or an object with its content")
    return content
