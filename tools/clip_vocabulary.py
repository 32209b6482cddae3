#!/usr/bin/env python3
"""CLIP's merges, which are built into the engine, and token ids for the unit test of src/io/clip_vocabulary.rs (development only).

    pip install torch transformers==4.57.6 tokenizers==0.22.2 ftfy regex && pip install --no-deps open_clip_torch==3.3.0
    python tools/clip_vocabulary.py

From `bpe_simple_vocab_16e6.txt.gz` of OpenAI's CLIP, as it lies in the package open_clip_torch, it writes

    assets/clip/merges.txt.gz       the 48,894 merges that CLIP takes of the 262,144 there, in the form of transformers' merges.txt
    tests/golden/clip_ids.json      {"versions", "vocabulary", "cases": [{"prompt", "ids", "ids_pad"?, "differ"?}]}

`ids` are CLIPTokenizerFast's, cut to 77 and not padded, from a folder as Stable Diffusion 1.x has it, whose vocab.json is made here;
`ids_pad` those with `!` as the pad token (2.x), where they are others; `differ` names which of CLIPTokenizer (with ftfy) and open_clip's
SimpleTokenizer give others: both mend the text first. `vocabulary` has number of tokens, bytes and CRC-32 of
all tokens in the order of their ids, each with a line feed, by SimpleTokenizer; and bytes and CRC-32 of merges.txt.
"""
import gzip
import importlib.util
import json
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path

from transformers import CLIPTokenizer, CLIPTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 49408
# What is left beside 256 bytes, the same at the end of a word, begin and end.
MERGES = TOKENS - 2 * 256 - 2
LENGTH = 77

PROMPTS = [
    "",
    "a photo of an astronaut riding a horse on mars",
    "a photograph of an astronaut riding a horse",
    "A  Large\tRED\n\ncircle\r\n ",
    "masterpiece, best quality, ultra-detailed, 8k, trending on artstation, by greg rutkowski",
    "lowres, bad anatomy, bad hands, text, error, missing fingers, jpeg artifacts, signature, watermark",
    "(a lighthouse:1.3) at [night | dusk], {storm}, --ar 16:9",
    "it's i'm we'll they'd you're I've don't 'S 'LL o'clock",
    "the artist's 1990s '68 Mustang isn't rock 'n' roll",
    "don\u2019t \u201cquote\u201d \u2014 \u2018me\u2019 \u2026",
    "1234567890 3.14159 1,000,000 3d 2nd 50% #1 $5 4k 24mm f/1.8 iso100",
    "!!! ??? ... :-) ;) <3 @user #hashtag a&b a_b x^2 ~ \\ / = + *",
    "a cat! a dog? stop!!! wait!?",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m A\u030a cr\u00e8me br\u00fbl\u00e9e jalape\u00f1o",
    "\u00dcn\u00efc\u00f6d\u00e9 gr\u00f6\u00dfer stra\u00dfe \u0130stanbul \u0142\u00f3d\u017a \u010desk\u00fd",
    "\ufb01ne \ufb02ow \uff21\uff22\uff23",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
    "\u03a3\u03b5\u03bb\u03b7\u03bd\u03b7 \u03ba\u03b1\u03b9 \u03b8\u03ac\u03bb\u03b1\u03c3\u03c3\u03b1",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u65e5\u672c\u8a9e \u732b a\u732bb \u5bcc\u58eb\u5c71 \ud55c\uad6d\uc5b4",
    "\U0001f600 emoji \U0001f469\u200d\U0001f680 \u2764\ufe0f \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\U0001f525\U0001f525\U0001f525 sunset\U0001f305vibes",
    "\u00bd \u00b2 \u2167 \u0663 \u2460 \u20ac5 \u00a9 \u2122 \u00b0",
    "\u00a0no-break\u3000wide\u2003em\u2028line",
    "a\u200bb c\u00add e\u0000f \ufffd",
    "<p>html &amp; entities &lt;b&gt;</p> http://x.y/z?q=1&r=2",
    "a <|endoftext|> b <|startoftext|>c <|ENDOFTEXT|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "qwxzjkv zzzzzzzz xyzzy hmmmmmm aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "sks dog <cat-toy> in the style of <midjourney-style>",
    "sdxl controlnet lora dreambooth img2img",
    "x " * 74 + "y",
    "x " * 75 + "y",
    "x " * 76 + "y",
    "an oil painting of a small wooden boat on a stormy sea at sunset, dramatic lighting, " * 6,
    "w" * 300,
    "\U0001f600" * 40,
    "caf\u00e9 " * 60,
]


def source():
    """The compressed merges and open_clip's tokenizer, without the rest of that package."""
    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return package / "bpe_simple_vocab_16e6.txt.gz", module.SimpleTokenizer()


def vocabulary(merges):
    """Token to id: bytes (printable ones first, which stand for themselves), bytes that end a word, what each merge makes, begin, end."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(c) for c in printable + list(range(0x100, 0x100 + 256 - len(printable)))]
    tokens = characters + [c + "</w>" for c in characters] + ["".join(m.split(" ")) for m in merges] + [BEGIN, END]
    ids = {token: i for i, token in enumerate(tokens)}
    assert len(ids) == len(tokens) == TOKENS
    return ids


def folder(path, ids, merges, pad):
    """A tokenizer's folder as Stable Diffusion has it."""
    def token(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    roles = {"bos_token": token(BEGIN), "eos_token": token(END), "pad_token": pad, "unk_token": token(END)}
    config = {
        name: {"__type": "AddedToken", **value} if isinstance(value, dict) else value for name, value in roles.items()
    } | {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (path / "merges.txt").write_text(merges, encoding="utf-8")
    (path / "special_tokens_map.json").write_text(json.dumps(roles))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def summary(text):
    data = text.encode()
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def main():
    compressed, simple = source()
    lines = gzip.decompress(compressed.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    text = "#version: 0.2\n" + "".join(line + "\n" for line in lines)
    ids = vocabulary(lines)
    theirs = sorted(simple.encoder, key=simple.encoder.get)
    theirs[-2:] = [BEGIN, END]  # which open_clip calls otherwise
    assert theirs == list(ids)

    out = ROOT / "assets" / "clip" / "merges.txt.gz"
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    with tempfile.TemporaryDirectory() as temporary:
        first, second = (folder(Path(temporary) / n, ids, text, pad) for n, pad in (("1", END), ("2", "!")))
        fast, slow, padded = (
            CLIPTokenizerFast.from_pretrained(first), CLIPTokenizer.from_pretrained(first), CLIPTokenizerFast.from_pretrained(second)
        )
    assert (fast.pad_token_id, padded.pad_token_id) == (ids[END], 0) and slow.fix_text is not None
    cases = []
    for prompt in PROMPTS:
        want, with_pad, of_slow = (t(prompt, max_length=LENGTH, truncation=True).input_ids for t in (fast, padded, slow))
        of_simple = simple(prompt)[0].tolist()
        case = {"prompt": prompt, "ids": want}
        if with_pad != want:
            case["ids_pad"] = with_pad
        differ = ["CLIPTokenizer"] * (of_slow != want) + ["open_clip"] * (of_simple != want + [0] * (LENGTH - len(want)))
        if differ:
            case["differ"] = differ
            print(f"{prompt!r}: others by {', '.join(differ)}")
        cases.append(case)
    about = {
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "open_clip_torch", "ftfy")},
        "vocabulary": {"tokens": len(theirs), **summary("".join(t + "\n" for t in theirs)), "merges": summary(text)},
    }
    golden = ROOT / "tests" / "golden" / "clip_ids.json"
    with open(golden, "w") as f:
        f.write(json.dumps(about)[:-1] + ', "cases": [\n')
        f.write(",\n".join(json.dumps(c) for c in cases) + "\n]}\n")
    print(f"{out}: {out.stat().st_size} bytes; {golden}: {len(cases)} prompts, {golden.stat().st_size} bytes")


if __name__ == "__main__":
    main()
