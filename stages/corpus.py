"""Text on which two tokenizers must agree: what breaks pre-tokenisation, merges, byte fallback and decoding."""

TEXTS = {
    "empty": "",
    "english": "The quick brown fox doesn't jump over the lazy dog's back; they'll've gone by 12:30, I'M SURE.",
    "code": (
        'def f(x: int, *args, **kwargs) -> "list[int]":\n'
        "    # comment\n"
        "\tif x <= 0 or not args:\n"
        '\t\treturn [~x & 0xFF, *map(lambda y: y**2, args)]  # trailing   \n'
        "    raise ValueError(f'{x!r:>10} != {args[0]:.3e}')\n\n\n"
        "#include <stdio.h>\r\nint main(void) { return printf(\"%d\\n\", 1 << 31) ? 0 : -1; }\r\n"
    ),
    "numbers": "0 1 12 123 1234 12345 1234567890 3.14159 -2e-10 0x7fff 1,000,000 ٣٤٥ ½ ² Ⅷ 10th",
    "cjk": "机器学习模型推理引擎。東京の天気は晴れです！한국어 텍스트를 토큰화합니다。「引用」『二重』，、；",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 ☺️ ☺ 1️⃣ 🤷🏿‍♀️ 🫠🪿",
    "combining": (
        "e\u0301 \u00e9 a\u0308\u0323 Z\u0351\u036b\u0343a\u0363 \u1e9b\u0323 \u0928\u093f \u0e01\u0e33 "
        "\ufb01 \u212b"
    ),
    "right to left": "السلام عليكم \u200fעברית\u200e mixed עם English ۱۲۳",
    "controls": (
        "a\x00b\x01c\x07d\x08e\x0bf\x0cg\x1bh\x7fi\x85j\u00adk\u200bl\u200dm\u2028n\u2029o\ufeffp\ufffdq"
        "\U000e0001r"
    ),
    "whitespace": " a  b   c    d\t\te\n\nf\r\n\r\ng \n h\t \ti\u00a0j\u3000k\u2003l \n\n\n   \n",
    "only spaces": " " * 37,
    "only newlines": "\n" * 19,
    "long run": "a" * 300 + "ab" * 150 + "=" * 120,
    "planes": "\u0000\u007f\u0080\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "template words": "<|user|>\nhello\n<|assistant|>\n<|im_start|><s></s>[INST]",
    "specials inside": "before<|endoftext|>after <|endoftext|> <|pad|>",
}  # fmt: skip

# Byte strings that are not UTF-8: stray continuation, cut sequences, overlong forms, surrogates, beyond the last plane.
INVALID_UTF8 = {
    "stray continuation": b"a\x80b",
    "cut two": b"caf\xc3",
    "cut four": b"x\xf0\x9f\x91 y",
    "overlong": b"\xc0\xaf\xe0\x80\xaf",
    "surrogate": b"\xed\xa0\x80 \xed\xbf\xbf",
    "beyond": b"\xf4\x90\x80\x80\xff\xfe",
    "mixed": "é".encode() + b"\xe9" + "語".encode()[:2] + b" end",
}
