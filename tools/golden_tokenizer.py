#!/usr/bin/env python3
"""Token ids that transformers gives, for the unit tests of src/io/tokenizer.rs and wordpiece.rs.

    python tools/golden_tokenizer.py tests/golden          # needs transformers==4.57.6, tokenizers==0.22.2

Reads GOLDEN/tokenizer (vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json) and writes
GOLDEN/tokenizer-fast/ (the same as tokenizer.json) and GOLDEN/tokenizer_ids.json:

    {"versions": ..., "cases": [{"prompt", "ids" (77), "ids_pad" (77, padded with "!"), "cut" (decoded, or null)}]}

The reference is CLIPTokenizerFast. The slow class without ftfy differs from it, and from OpenAI's own, where a prompt
holds Chinese characters, control or format characters, or a final sigma; "slow_differs" marks those.

GOLDEN/bert_ids.json has {"prompt", "ids" (77)} by BertTokenizer, which diffusers takes, with the vocabulary of
GOLDEN/ldm-tiny/tokenizer.
"""
import json
import os
import shutil
import sys
import tempfile

import tokenizers
import transformers
from transformers import BertTokenizer, CLIPTokenizer, CLIPTokenizerFast

PROMPTS = [
    "",
    " ",
    "a red circle above a green square",
    "a photograph of an astronaut riding a horse",
    "A  Large\tRED\n\ncircle\r\n ",
    "\u00a0no-break\u3000wide\u2003em\u2028line\u0085next",
    "it's i'm we'll they'd you're I've don't 'S 'LL",
    "don\u2019t 'tis o'clock !!'s a's",
    "1234 5.67 3d 2nd 1,000,000",
    "!!! ??? ... (a:1.2) [b] {c|d}, -- 'quoted' \"x\" #1 50% a&b a_b x^2 ~ \\ /",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a \u1e9b\u0323",
    "\u00dcn\u00efc\u00f6d\u00e9 \u00c5NGSTR\u00d6M \ufb01 \u00df \u1e9e \u0130stanbul I\u0307",
    "\u03a3\u0391\u03a3 \u03c3\u03b1\u03c2",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u65e5\u672c\u8a9e \u732b a\u732bb \ud55c\uad6d\uc5b4",
    "\U0001f600 emoji \U0001f469\u200d\U0001f680 \u2764\ufe0f",
    "\u00bd \u00b2 \u2167 \u0663 \u2460",
    "a\u200bb c\u00add\ufeff e\u0000f\u0007g \ufffd",
    "<|endoftext|> x <|startoftext|>y<|ENDOFTEXT|> <|endoftext| >",
    "<p>html &amp; entities</p> http://x.y/z?q=1",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x " * 74 + "y",
    "x " * 75 + "y",
    "a large red circle above a small green square on a white background, " * 8,
    "w" * 400,
    "caf\u00e9 " * 60,
    "\U0001f600" * 40,
    "a" + " " * 500 + "b",
    "one, two! " * 30 + "<|endoftext|> three",
]


def main(golden):
    folder, fast_folder = os.path.join(golden, "tokenizer"), os.path.join(golden, "tokenizer-fast")
    slow = CLIPTokenizer.from_pretrained(folder)
    fast = CLIPTokenizerFast.from_pretrained(folder)
    padded = with_pad(folder, "!")
    n = fast.model_max_length

    def ids(tokenizer, prompt):
        return tokenizer(prompt, padding="max_length", max_length=n, truncation=True).input_ids

    cases = []
    for prompt in PROMPTS:
        case = {"prompt": prompt, "ids": ids(fast, prompt), "ids_pad": ids(padded, prompt)}
        whole = fast(prompt, truncation=False).input_ids[1:-1]
        case["tokens"] = len(whole)
        case["cut"] = fast.decode(whole[n - 2:]).strip() if len(whole) > n - 2 else None
        if ids(slow, prompt) != case["ids"]:
            case["slow_differs"] = True
        cases.append(case)
    os.makedirs(fast_folder, exist_ok=True)
    fast.backend_tokenizer.save(os.path.join(fast_folder, "tokenizer.json"), pretty=False)
    shutil.copy(os.path.join(folder, "tokenizer_config.json"), fast_folder)
    bert = BertTokenizer.from_pretrained(os.path.join(golden, "ldm-tiny", "tokenizer"))
    prompts = [p.replace("<|endoftext|>", "[SEP]").replace("<|ENDOFTEXT|>", "[sep]") for p in PROMPTS]
    length = dict(padding="max_length", max_length=77, truncation=True)
    write(golden, "bert_ids.json", [{"prompt": p, "ids": bert(p, **length).input_ids} for p in prompts])
    write(golden, "tokenizer_ids.json", cases)


def write(golden, name, cases):
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    with open(os.path.join(golden, name), "w") as f:
        f.write('{"versions": %s, "cases": [\n' % json.dumps(versions))
        f.write(",\n".join(json.dumps(c) for c in cases) + "\n]}\n")


def with_pad(folder, pad):
    """The same tokenizer with another padding token, as Stable Diffusion 2 has it."""
    tmp = tempfile.mkdtemp()
    try:
        copy = os.path.join(tmp, "t")
        shutil.copytree(folder, copy)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = os.path.join(copy, name)
            os.chmod(path, 0o644)
            with open(path) as f:
                config = json.load(f)
            config["pad_token"] = pad
            with open(path, "w") as f:
                json.dump(config, f)
        return CLIPTokenizerFast.from_pretrained(copy)
    finally:
        shutil.rmtree(tmp)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
