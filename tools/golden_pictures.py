#!/usr/bin/env python3
"""Pictures that diffusers makes from a seed, for `tests/pictures.rs` (development only).

    pip install torch diffusers==0.37.1 transformers==4.57.6 safetensors pillow
    python tools/golden_pictures.py

Writes tests/golden/pictures/NAME.png, and commands.json with the arguments of `ldm sample`, given in that folder, that must
make the same; and the mask and the small picture that some of them name.
"""
import json
from pathlib import Path

import torch
import diffusers
from PIL import Image

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
PROMPT, NEGATIVE = "a photo of a cat, highly detailed", "blurry"


def mask(width, height):
    """A disc that fades out in a colour, over the upper left: what is half white or more is drawn anew."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    far = ((x - 0.4 * width).square() + (y - 0.45 * height).square()).sqrt() / (0.45 * width)
    rgb = (1.6 - 1.4 * far)[..., None].clamp(0, 1) * torch.tensor([255.0, 230.0, 180.0])
    return Image.fromarray(rgb.round().to(torch.uint8).numpy())


def main():
    out = GOLDEN / "pictures"
    out.mkdir(exist_ok=True)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(GOLDEN / "sd15-tiny", local_files_only=True)
    commands = {}

    def pipeline(cls, scheduler, pipe=pipe):
        parts = dict(pipe.components)
        if scheduler:
            parts["scheduler"] = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        made = cls(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    def add(name, image, *arguments, model="sd15-tiny", prompt=("-p", PROMPT)):
        image.save(out / f"{name}.png")
        commands[name] = ["-m", f"../{model}", *prompt, *arguments]

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

    # Inpainting: by a model that is made for it, and with known parts put back after each step.
    mask(*init.size).save(out / "mask.png")
    painter = diffusers.StableDiffusionInpaintPipeline.from_pretrained(GOLDEN / "inpaint-tiny", local_files_only=True)
    for name, model, whole, scheduler, flags, strength, eta in (
        ("inpaint", "inpaint-tiny", painter, None, [], 1.0, 0.0),
        ("inpaint-strength", "inpaint-tiny", painter, "DDIMScheduler", ["ddim"], 0.6, 0.5),
        ("inpaint-euler", "inpaint-tiny", painter, "EulerDiscreteScheduler", ["euler"], 1.0, 0.0),
        ("known", "sd15-tiny", pipe, None, [], 1.0, 0.0),
        ("known-strength", "sd15-tiny", pipe, "DDIMScheduler", ["ddim"], 0.6, 0.5),
        ("known-heun", "sd15-tiny", pipe, "HeunDiscreteScheduler", ["heun"], 1.0, 0.0),
        ("known-dpm++2m", "sd15-tiny", pipe, "DPMSolverMultistepScheduler", ["dpm++2m"], 0.8, 0.0),
    ):
        made = pipeline(diffusers.StableDiffusionInpaintPipeline, scheduler, whole)
        given = dict(image=init, mask_image=Image.open(out / "mask.png"), height=init.height, width=init.width)
        image = made(PROMPT, **given, strength=strength, eta=eta, num_inference_steps=5, generator=seed(21)).images[0]
        more = ["--sampling-method", *flags] if flags else []
        more += ["--strength", str(strength)] if strength < 1 else []
        more += ["--eta", str(eta)] if eta else []
        add(name, image, "-i", "own-sampler.png", "--mask", "mask.png", "--no-composite", "--steps", "5", "-s", "21",
            *more, model=model)

    init.resize((32, 32), Image.BICUBIC).save(out / "small.png")
    larger = diffusers.LDMSuperResolutionPipeline.from_pretrained(GOLDEN / "upscale-tiny", local_files_only=True)
    larger.set_progress_bar_config(disable=True)
    for name, eta in (("upscale", 0.0), ("upscale-eta", 1.0)):
        # The pipeline draws the noise of its steps from the generator of the process, whichever it is given.
        torch.manual_seed(31)
        image = larger(Image.open(out / "small.png"), num_inference_steps=6, eta=eta).images[0]
        add(name, image, "-i", "small.png", "--steps", "6", "-s", "31", "--eta", str(eta), model="upscale-tiny", prompt=())
    (out / "commands.json").write_text(json.dumps(commands, indent=1) + "\n")


if __name__ == "__main__":
    main()
