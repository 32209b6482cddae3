#!/usr/bin/env python3
"""Pictures that diffusers makes from a seed, for `tests/cli.rs` (development only).

    pip install torch diffusers==0.37.1 transformers==4.57.6 safetensors pillow
    python tools/golden_pictures.py

Writes tests/golden/pictures/NAME.png, and commands.json with the arguments of `ldm sample` that must make the same.
"""
import json
from pathlib import Path

import torch
import diffusers
from PIL import Image

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
PROMPT, NEGATIVE = "a photo of a cat, highly detailed", "blurry"


def main():
    out = GOLDEN / "pictures"
    out.mkdir(exist_ok=True)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(GOLDEN / "sd15-tiny", local_files_only=True)
    commands = {}

    def pipeline(cls, scheduler):
        parts = dict(pipe.components)
        if scheduler:
            parts["scheduler"] = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        made = cls(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    def add(name, image, *arguments):
        image.save(out / f"{name}.png")
        commands[name] = ["-p", PROMPT, *arguments]

    text = diffusers.StableDiffusionPipeline
    seed = lambda n: torch.Generator().manual_seed(n)
    plain = pipeline(text, None)(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=5, generator=seed(7)).images[0]
    add("own-sampler", plain, "-n", NEGATIVE, "--steps", "5", "-s", "7")
    for flag, scheduler in (("euler", "EulerDiscreteScheduler"), ("dpm++2m", "DPMSolverMultistepScheduler")):
        image = pipeline(text, scheduler)(PROMPT, num_inference_steps=4, generator=seed(8), height=96, width=64).images[0]
        add(flag, image, "--steps", "4", "-s", "8", "-W", "64", "-H", "96", "--sampling-method", flag)
    ddim = pipeline(text, "DDIMScheduler")
    image = ddim(PROMPT, num_inference_steps=4, generator=seed(3), eta=0.7).images[0]
    add("ddim-eta", image, "--steps", "4", "-s", "3", "--eta", "0.7", "--sampling-method", "ddim")
    image = ddim(PROMPT, num_inference_steps=4, generator=seed(3), guidance_scale=1.0, clip_skip=1).images[0]
    add("no-guidance-clip-skip", image, "--steps", "4", "-s", "3", "--cfg-scale", "1", "--clip-skip", "2",
        "--sampling-method", "ddim")
    img2img = pipeline(diffusers.StableDiffusionImg2ImgPipeline, "DDIMScheduler")
    init = Image.open(out / "own-sampler.png").convert("RGB")
    image = img2img(PROMPT, image=init, strength=0.6, num_inference_steps=5, generator=seed(11)).images[0]
    add("img2img", image, "-i", "own-sampler.png", "--strength", "0.6", "--steps", "5", "-s", "11",
        "--sampling-method", "ddim")
    (out / "commands.json").write_text(json.dumps(commands, indent=1) + "\n")


if __name__ == "__main__":
    main()
