#!/usr/bin/env python3
"""Inputs and outputs of diffusers for a checkpoint, for `ldm verify --reference` (development only).

    pip install torch diffusers==0.37.1 transformers==4.57.6 safetensors
    python tools/record.py modules  CKPT OUT.safetensors [--batch 2] [--size 16]
    python tools/record.py pipeline CKPT OUT.safetensors [--sampler euler] [--steps 6] [--strength 0.6]

Everything runs on the CPU in f32, and every input is in the file: an engine needs no generator of its own to be judged.
Pictures and latents are (B,C,H,W).

`modules` has one forward pass of each part that the folder holds:

    text.ids                              -> text.hidden_NN, text.last, text.pooled
    unet.sample, unet.timestep, unet.context -> unet.out
    vae.image -> vae.moments (means, then log-variances); vae.latents -> vae.decoded
    vq.image -> vq.latents -> vq.indices, vq.quantized; vq.decode_in -> vq.decoded
    vq.margin                             how much farther the second code is than the first, in squared distance

`pipeline` has one call of the folder's pipeline, as it passes from part to part. One with classes is a
StableDiffusionPipeline that is given rows of the table; its prompt is a class by number, and the null class is guided against:

    prompt_ids, negative_ids              one row each, whatever the batch
    input_image, mask                     with --strength, for inpainting and super-resolution
    masked_noise -> masked_latents        of the masked picture, for an inpainting model, and what they are drawn with
    context                               of the UNet, negative prompts first
    initial_latents, timesteps            what the sampler starts from, and evaluates at
    unet_input_000                        of the first evaluation, with all channels
    model_output_NNN, latents_NNN         after guidance, and after the sampler's step, by evaluations
    decoder_input, image                  pictures are in 0...1 here

The metadata has, as JSON under the key `reference`, the settings of the run and `floors`: for bf16 and f16 the relative
error of PyTorch itself in that type, tensor by tensor, of every tensor that is computed.
"""
import argparse
import contextlib
import functools
import json
import math
import sys
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion
from diffusers.utils import torch_utils
from safetensors.torch import load_file, save_file

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
TIMESTEP = 481
LOW_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Record:
    """Named tensors in f32 or integers. `given` are inputs and exact facts, `computed` have a rounding error."""

    def __init__(self):
        self.given, self.computed, self.settings = {}, {}, {}

    @staticmethod
    def keep(x):
        x = x.detach()
        return (x.float() if x.is_floating_point() else x).clone().contiguous()

    def give(self, name, x):
        self.given[name] = self.keep(x)
        return x

    def compute(self, name, x):
        self.computed[name] = self.keep(x)
        return x

    def tensors(self):
        return {**self.given, **self.computed}

    def errors(self, reference):
        """Relative error of everything computed here, against another record."""
        pairs = ((name, x.double(), reference.computed[name].double()) for name, x in self.computed.items())
        return {name: float(f"{float((x - y).norm() / y.norm()):.6g}") for name, x, y in pairs}


class Inputs:
    """Drawn in f32 in a fixed order, so that they are the same whatever type the models have."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def picture(self, side):
        """A few waves in random directions and some grain, in -1...1."""
        axis = torch.linspace(0, 2 * math.pi, side)
        amplitude, down, across, phase = self.randn(4, 3, 5, 1, 1)
        waves = amplitude * torch.sin(2 * down * axis[:, None] + 2 * across * axis + 3 * phase)
        return (0.4 * waves.sum(1) + 0.05 * self.randn(3, side, side)).clamp(-1, 1)[None]


def token_ids(tokenizer, *prompts):
    """As the pipelines have them: that of 2022 takes 77, whatever its tokenizer says."""
    length = 77 if isinstance(tokenizer, transformers.BertTokenizer) else tokenizer.model_max_length
    settings = dict(padding="max_length", truncation=True, max_length=length)
    return tokenizer(list(prompts), return_tensors="pt", **settings).input_ids


def factor(autoencoder):
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


# Parts, each on its own


def record_modules(a, dtype):
    record, inputs, folder = Record(), Inputs(a.seed), Path(a.checkpoint)
    index = json.loads((folder / "model_index.json").read_text())

    def part(name):
        library, kind = index.get(name) or (None, None)
        if kind is None or not (folder / name).is_dir():
            return None
        modules = {"diffusers": diffusers, "latent_diffusion": pipeline_latent_diffusion}
        made = getattr(modules.get(library, transformers), kind).from_pretrained(folder / name)
        return made.to(dtype).eval() if isinstance(made, torch.nn.Module) else made

    text = part("text_encoder") or part("bert")
    if text is not None:
        record_text(record, text, token_ids(part("tokenizer"), a.negative, a.prompt))
    unet = part("unet")
    if unet is not None:
        record_unet(record, unet, inputs, a, dtype)
    autoencoder = part("vae") or part("vqvae")
    if isinstance(autoencoder, diffusers.VQModel):
        record_vq(record, autoencoder, inputs, a, dtype)
    elif autoencoder is not None:
        record_kl(record, autoencoder, inputs, a, dtype)
    record.settings = {"class": index["_class_name"]}
    return record


def record_text(record, text, ids):
    out = text(record.give("text.ids", ids), output_hidden_states=True)
    clip = isinstance(text, transformers.CLIPTextModel)
    # The last state of the other one is after the last norm.
    for i, hidden in enumerate(out.hidden_states if clip else out.hidden_states[:-1]):
        record.compute(f"text.hidden_{i:02}", hidden)
    record.compute("text.last", out.last_hidden_state)
    if clip:
        record.compute("text.pooled", out.pooler_output)


def record_unet(record, unet, inputs, a, dtype):
    side = a.size or unet.config.sample_size
    x = record.give("unet.sample", inputs.randn(a.batch, unet.config.in_channels, side, side))
    context = record.give("unet.context", inputs.randn(a.batch, 77, unet.config.cross_attention_dim))
    record.give("unet.timestep", torch.tensor([float(TIMESTEP)]))
    record.compute("unet.out", unet(x.to(dtype), TIMESTEP, context.to(dtype)).sample)


def record_kl(record, vae, inputs, a, dtype):
    side = a.size or vae.config.sample_size // factor(vae)
    image = record.give("vae.image", inputs.picture(side * factor(vae)))
    record.compute("vae.moments", vae.encode(image.to(dtype)).latent_dist.parameters)
    z = inputs.randn(1, vae.config.latent_channels, side, side) / vae.config.scaling_factor
    record.compute("vae.decoded", vae.decode(record.give("vae.latents", z).to(dtype)).sample)


def record_vq(record, vq, inputs, a, dtype):
    side = a.size or vq.config.sample_size // factor(vq)
    image = record.give("vq.image", inputs.picture(side * factor(vq)))
    z = record.compute("vq.latents", vq.encode(image.to(dtype)).latents)
    quantized, _, (_, _, codes) = vq.quantize(z)
    record.give("vq.quantized", quantized)
    record.give("vq.indices", codes.reshape(1, side, side).long())
    vectors, book = z.double().permute(0, 2, 3, 1), vq.quantize.embedding.weight.double()
    squares = (vectors[..., None, :] - book).square().sum(-1).sort(dim=-1).values
    record.give("vq.margin", (squares[..., 1] - squares[..., 0]).float())
    start = record.give("vq.decode_in", inputs.randn(*z.shape))
    record.compute("vq.decoded", vq.decode(start.to(dtype)).sample)


# The whole pipeline


@contextlib.contextmanager
def tapped(owner, name, observe):
    """Shows an observer every call of a method, result first. The signature stays as it was: pipelines look at it."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def call(*positional, **named):
        result = method(*positional, **named)
        observe(result, *positional, **named)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


@contextlib.contextmanager
def noise_in_f32(models, drawn):
    """Lets diffusers draw all noise in f32 and round it to the type of the models: torch's generator gives other numbers
    for each type. `drawn` is a list that gets every draw."""
    plain = torch_utils.randn_tensor

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        drawn.append(plain(shape, generator, device, torch.float32, layout))
        return drawn[-1].to(dtype or models)

    with contextlib.ExitStack() as patches:
        for module in [m for n, m in sys.modules.items() if n.startswith("diffusers.") and m is not torch_utils]:
            if vars(module).get("randn_tensor") is plain:
                patches.enter_context(mock.patch.object(module, "randn_tensor", randn_tensor))
        yield


def open_pipeline(a, dtype):
    """With the sampler made from the folder's configuration before the pipeline is, which corrects old ones."""
    index = diffusers.DiffusionPipeline.load_config(a.checkpoint)
    if a.strength is not None and index["_class_name"] != "StableDiffusionPipeline":
        sys.exit(f"--strength is for a StableDiffusionPipeline; this folder is a {index['_class_name']}")
    cls = getattr(diffusers, SAMPLERS[a.sampler] if a.sampler else index["scheduler"][1])
    scheduler = cls.from_pretrained(a.checkpoint, subfolder="scheduler")
    kind = diffusers.DiffusionPipeline if a.strength is None else diffusers.StableDiffusionImg2ImgPipeline
    settings = dict(scheduler=scheduler, torch_dtype=dtype, local_files_only=True)
    if "class_embedder" in index:
        settings |= dict(text_encoder=None, tokenizer=None)
    pipe = kind.from_pretrained(a.checkpoint, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def record_pipeline(a, dtype):
    record, inputs, pipe = Record(), Inputs(a.seed), open_pipeline(a, dtype)
    vae = getattr(pipe, "vqvae", None) or pipe.vae
    side = (a.size or pipe.unet.config.sample_size) * factor(vae)
    table = Path(a.checkpoint) / "class_embedder" / "diffusion_pytorch_model.safetensors"
    timesteps, drawn = [], []
    # Of pictures that are given to the UNet, the channels are computed.
    beside = pipe.unet.config.in_channels > pipe.unet.config.out_channels
    if type(pipe).__name__ == "StableDiffusionInpaintPipeline" and not beside:
        sys.exit("this UNet is given no mask: what is known is put back after each step, which is not recorded; see `modules`")

    def picture(side=side):
        return record.give("input_image", inputs.picture(side) / 2 + 0.5)

    def evaluated(_, sample, timestep, encoder_hidden_states=None, **_rest):
        if not timesteps:
            (record.compute if beside else record.give)("unet_input_000", sample)
            if encoder_hidden_states is not None:
                record.compute("context", encoder_hidden_states)

    def stepped(result, model_output, timestep, sample, **_rest):
        n = len(timesteps)
        if n == 0:
            record.give("initial_latents", sample)
        record.compute(f"model_output_{n:03}", model_output)
        record.compute(f"latents_{n:03}", result[0])
        timesteps.append(float(timestep))

    def decoded(_, z, **_rest):
        record.compute("decoder_input", z)

    if isinstance(pipe, diffusers.StableDiffusionInpaintPipeline):
        mask = torch.zeros(1, 1, side, side)
        mask[..., side // 4 :, : side // 2] = 1
        special = {"image": picture(), "mask_image": record.give("mask", mask), "strength": 1.0}
        special |= {"height": side, "width": side}
    elif isinstance(pipe, diffusers.LDMSuperResolutionPipeline):
        special = {"image": 2 * picture(side // factor(vae)) - 1}
    elif a.strength is not None:
        special = {"image": picture(), "strength": a.strength}
    else:
        special = {"height": side, "width": side}
    if isinstance(pipe, diffusers.LDMTextToImagePipeline):
        ids = token_ids(pipe.tokenizer, a.prompt), token_ids(pipe.tokenizer, "")
        special |= {"prompt": [a.prompt] * a.batch}
    elif isinstance(pipe, diffusers.LDMPipeline):
        ids, special = None, {"batch_size": a.batch}
    elif isinstance(pipe, diffusers.LDMSuperResolutionPipeline):
        ids, special["image"] = None, special["image"].repeat(a.batch, 1, 1, 1)
    elif table.is_file():
        rows = load_file(table)["embedding.weight"].to(dtype)
        ids = torch.tensor([[int(a.prompt)]]), torch.tensor([[len(rows) - 1]])
        prompt, negative = (rows[i].expand(a.batch, 1, -1) for i in ids)
        special |= {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    else:
        ids = token_ids(pipe.tokenizer, a.prompt), token_ids(pipe.tokenizer, a.negative)
        special |= {"prompt": [a.prompt] * a.batch, "negative_prompt": [a.negative] * a.batch}
    if ids is not None:
        special |= {"guidance_scale": a.guidance}

    with contextlib.ExitStack() as stack:
        stack.enter_context(noise_in_f32(dtype, drawn))
        stack.enter_context(tapped(pipe.unet, "forward", evaluated))
        stack.enter_context(tapped(pipe.scheduler, "step", stepped))
        stack.enter_context(tapped(vae, "decode", decoded))
        # numpy has no bf16.
        plain = torch.Tensor.numpy
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", lambda x: plain(x.float())))
        out = pipe(
            num_inference_steps=a.steps,
            generator=inputs.generator,
            output_type="pt",
            **special,
        )
    images = out.images
    record.compute("image", images if torch.is_tensor(images) else torch.from_numpy(images).permute(0, 3, 1, 2))
    record.give("timesteps", torch.tensor(timesteps))
    if isinstance(pipe, diffusers.StableDiffusionInpaintPipeline):
        # The first draw is what the sampler starts from.
        record.give("masked_noise", drawn[1])
        z = vae.config.latent_channels
        record.compute("masked_latents", record.computed["unet_input_000"][-a.batch :, z + 1 :])
    if ids is not None:
        record.give("prompt_ids", ids[0])
        record.give("negative_ids", ids[1])
    record.settings = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": a.steps,
        "guidance": a.guidance,
        "strength": a.strength,
        "eta": 0.0,
    }
    return record


def flags():
    f = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    f.add_argument("what", choices=["modules", "pipeline"])
    f.add_argument("checkpoint", metavar="CKPT")
    f.add_argument("out", metavar="OUT.safetensors")
    f.add_argument("--size", type=int, help="side of the latents; by default the checkpoint's")
    f.add_argument("--batch", type=int, default=1)
    f.add_argument("--seed", type=int, default=0)
    f.add_argument("--prompt", default="an oil painting of a lighthouse above the stormy sea")
    f.add_argument("--negative", default="blurry, low quality")
    f.add_argument("--sampler", choices=SAMPLERS, help="by default the checkpoint's")
    f.add_argument("--steps", type=int, default=4)
    f.add_argument("--guidance", type=float, default=7.5)
    f.add_argument("--strength", type=float, help="start from a picture, with so much noise (0...1)")
    f.add_argument("--no-floors", action="store_true", help="leave out the runs in bf16 and f16")
    f.add_argument("--threads", type=int, help="of PyTorch")
    return f.parse_args()


@torch.no_grad()
def main():
    a = flags()
    diffusers.utils.logging.disable_progress_bar()
    if a.threads:
        torch.set_num_threads(a.threads)
    run = record_modules if a.what == "modules" else record_pipeline
    record, floors = run(a, torch.float32), {}
    bad = [name for name, x in record.tensors().items() if not torch.isfinite(x).all()]
    if bad:
        sys.exit(f"not finite: {', '.join(bad)}")
    for name, dtype in {} if a.no_floors else LOW_TYPES.items():
        try:
            floors[name] = run(a, dtype).errors(record)
        except RuntimeError as e:  # an operator that torch's CPU lacks in this type
            print(f"no floors in {name}: {e}", file=sys.stderr)
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    about = {"prompt": a.prompt, "negative": a.negative, "seed": a.seed, "versions": versions, "floors": floors}
    meta = {"checkpoint": Path(a.checkpoint).resolve().name, **record.settings, **about}
    save_file(record.tensors(), a.out, metadata={"reference": json.dumps(meta, sort_keys=True)})
    print(f"{'tensor':24} {'shape':18} {'spread':>8}" + "".join(f" {t:>9}" for t in floors))
    for name, x in record.tensors().items():
        spread = f"{float(x.std()):8.4f}" if x.is_floating_point() and x.numel() > 1 else " " * 8
        errors = "".join(f" {floors[t].get(name, math.nan):9.2e}" for t in floors) if name in record.computed else ""
        print(f"{name:24} {str(tuple(x.shape)):18} {spread}{errors}")


if __name__ == "__main__":
    main()
