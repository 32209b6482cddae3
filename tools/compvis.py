#!/usr/bin/env python3
"""The original code of latent diffusion as the judge of single-file checkpoints (development only).

    pip install torch diffusers==0.37.1 transformers==4.57.6 safetensors einops omegaconf tqdm torchvision
    pip install ftfy regex; pip install --no-deps open_clip_torch==2.7.0         for Stable Diffusion 2.x
    python tools/compvis.py names OUT --original ORIGINAL [--only NAME] [--all]
    python tools/compvis.py check FILE CHECKPOINT --original ORIGINAL

ORIGINAL is a folder of checkouts, each under the name of its repository:

    latent-diffusion        github.com/CompVis/latent-diffusion, a506df5
    stable-diffusion        github.com/CompVis/stable-diffusion, 21f890f
    taming-transformers     github.com/CompVis/taming-transformers, 3ba01b2: the quantiser, taming/modules/vqvae/quantize.py
    stablediffusion         github.com/Stability-AI/stablediffusion, cf1d67a: Stable Diffusion 2.x

`names` builds the models of the published configurations on the meta device, and writes the names and shapes of their
state dicts. OUT/NAME.tsv has a line `name<TAB>shape` for each tensor, sorted by name; a scalar's shape is empty. What
training alone has is left out (`loss.*`, and `model_ema.*` but for one configuration). The parts that LISTED names are
written, or all of them with --all; OUT/parts.tsv has a line for each part of every configuration:

    configuration, part, tensors, numbers in them, and the 64-bit FNV-1a of the part's lines with their newlines, in hex

tests/golden/compvis is made so.

`check` takes FILE, that `ldm convert CHECKPOINT -o FILE` wrote, and CHECKPOINT, the diffusers folder of a model or of an
autoencoder alone. It builds the original modules for the configuration in the file's header, loads the file's tensors
without leave to miss or to ignore one, and compares each module with that of diffusers for CHECKPOINT, on the same inputs,
in f32. The worst difference, relative in norm and to the greatest value, must be at most 1e-4. The schedule's 12 buffers
must be those that the original class computes in f64 and rounds, but for a last bit; a `scale_factor` beside them must be
the autoencoder's. Of a Stable Diffusion model diffusers reads FILE too, and every tensor must be that of CHECKPOINT, bit
for bit. A file in f16 or bf16 is compared with CHECKPOINT rounded to that type. The exit code is 1 where something is wrong.

Modules that the originals import and that are not needed here have empty stand-ins (pytorch_lightning, clip, kornia).
What the originals' constructors hold fixed is set from outside, and `check` says so in a line that starts with "set": the
groups of norms (theirs are 32), heads that have neither one number nor one size, the hidden width of a text encoder.
"""
import argparse
import contextlib
import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import compvis_originals as original
from compvis_originals import LDM, SD1, SD2, Originals, fail, note

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1e-4
UNET, FIRST_STAGE, COND_STAGE, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
PART_NAMES = {UNET: "unet", FIRST_STAGE: "first_stage", COND_STAGE: "cond_stage", EMA: "ema"}

# The published configurations: the repository, the file in it, and what is changed of its model's parameters.
NO_EMA = {"use_ema": False}
NO_TOKENIZER = {"use_ema": False, "cond_stage_config": {"params": {"use_tokenizer": False}}}
MASKS = {"unet_config": {"params": {"in_channels": 9}}}
CONFIGURATIONS = {
    "sd15": (SD1, "configs/stable-diffusion/v1-inference.yaml", {}),
    "sd15-inpainting": (SD1, "configs/stable-diffusion/v1-inference.yaml", MASKS),
    "sd21": (SD2, "configs/stable-diffusion/v2-inference-v.yaml", {}),
    "sd2-inpainting": (SD2, "configs/stable-diffusion/v2-inpainting-inference.yaml", {}),
    "txt2img-1p4B-kl8": (LDM, "configs/latent-diffusion/txt2img-1p4B-eval.yaml", NO_TOKENIZER),
    "text2img256-vq4": (LDM, "models/ldm/text2img256/config.yaml", NO_TOKENIZER),
    "cin256-v1-vq8": (LDM, "models/ldm/cin256/config.yaml", NO_EMA),
    "cin256-v2-vq4": (LDM, "configs/latent-diffusion/cin256-v2.yaml", {}),
    "layout2img-openimages256-vq4": (LDM, "models/ldm/layout2img-openimages256/config.yaml", NO_EMA),
    "celebahq256-vq4": (LDM, "models/ldm/celeba256/config.yaml", {}),
    "churches256-kl8": (LDM, "models/ldm/lsun_churches256/config.yaml", NO_EMA),
    "bsr-sr-vq4": (LDM, "models/ldm/bsr_sr/config.yaml", NO_EMA),
    "inpainting-big-vq4": (LDM, "models/ldm/inpainting_big/config.yaml", NO_EMA),
    "semantic256-vq4": (LDM, "models/ldm/semantic_synthesis256/config.yaml", NO_EMA),
} | {
    name: (LDM, f"models/first_stage_models/{name}/config.yaml", {})
    for name in ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
}
# The parts that are written in full: one of each form.
LISTED = {
    "sd15": (UNET, FIRST_STAGE, COND_STAGE, ""),
    "sd21": (COND_STAGE,),  # OpenCLIP
    "layout2img-openimages256-vq4": (COND_STAGE,),  # the text encoder of 2022, with 16 layers
    "celebahq256-vq4": (UNET,),  # plain attention, in all levels but the first
    "churches256-kl8": (UNET, ""),  # plain attention, and blocks that resample; the scale factor is a tensor
    "vq-f16": ("",),  # attention within the lowest level
    "vq-f4-noattn": ("",),
}


# Names


def clip_of_stable_diffusion():
    config = json.loads((ROOT / "src" / "presets" / "sd15.json").read_text())["text_encoder"]
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))


def open_clip_of(arch):
    import open_clip

    return open_clip.factory.create_model(arch, device=torch.device("meta"))


@contextlib.contextmanager
def schedule_on_the_cpu(ddpm):
    """The schedule is computed, not only shaped."""
    register = ddpm.register_schedule

    def register_schedule(*a, **k):
        with torch.device("cpu"):
            register(*a, **k)

    with mock.patch.object(ddpm, "register_schedule", register_schedule):
        yield


def listing(originals, name):
    """Names and shapes of a configuration's state dict."""
    repository, path, changes = CONFIGURATIONS[name]
    originals.use(repository)
    config = OmegaConf.load(originals.used / path)["model"]
    OmegaConf.update(config, "params", OmegaConf.create(changes), merge=True)
    for params in (config.params, config.params.get("first_stage_config", {}).get("params", {})):
        params.pop("ckpt_path", None)
        if "lossconfig" in params:
            params.lossconfig = {"target": "torch.nn.Identity"}
    with contextlib.ExitStack() as stack:
        for setting in (original.quiet(), torch.device("meta"), original.clip_is(clip_of_stable_diffusion)):
            stack.enter_context(setting)
        if repository == SD2:
            stack.enter_context(original.open_clip_is(open_clip_of))
        if "unet_config" in config.params:
            stack.enter_context(schedule_on_the_cpu(originals.module("models.diffusion.ddpm").DDPM))
        model = originals.module("util").instantiate_from_config(config)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    if "FrozenCLIPEmbedder" in str(config.params.get("cond_stage_config")):
        # transformers saved it in the version that the repository pins (4.19.2), and no longer does.
        shapes[COND_STAGE + "transformer.text_model.embeddings.position_ids"] = (1, 77)
    return shapes


def prefix_of(key):
    return next((prefix for prefix in PART_NAMES if key.startswith(prefix)), "")


def lines(shapes):
    return [f"{key}\t{','.join(map(str, shape))}\n" for key, shape in sorted(shapes.items())]


def fnv1a(text):
    digest = 0xCBF29CE484222325
    for byte in text.encode():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


def write(path, text):
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def names(a):
    out, originals, table = Path(a.out), Originals(a.original), []
    out.mkdir(parents=True, exist_ok=True)
    for name in a.only or CONFIGURATIONS:
        shapes = listing(originals, name)
        parts = {}
        for key, shape in shapes.items():
            parts.setdefault(prefix_of(key), {})[key] = shape
        for prefix, part in sorted(parts.items()):
            kind = PART_NAMES.get(prefix) or ("schedule" if UNET in parts else "first_stage")
            numbers = sum(math.prod(shape) for shape in part.values())
            table.append(f"{name}\t{kind}\t{len(part)}\t{numbers}\t{fnv1a(''.join(lines(part)))}\n")
            print(table[-1], end="")
        wanted = parts if a.all else LISTED.get(name, ())
        if wanted:
            write(out / f"{name}.tsv", "".join(lines({key: shape for prefix in wanted for key, shape in parts[prefix].items()})))
    if not a.only:
        write(out / "parts.tsv", "".join(table))


# Checks


class Checkpoint:
    """A single file beside the diffusers folder that it was made from."""

    def __init__(self, file, folder):
        self.file, self.folder, self.faults = Path(file), Path(folder), []
        self.alone = (self.folder / "config.json").is_file()
        if not self.alone and not (self.folder / "model_index.json").is_file():
            fail(f"{folder}: no model_index.json; want the folder that FILE was made from, of a model or of an autoencoder")
        try:
            with safe_open(file, "pt") as header:
                self.metadata = header.metadata() or {}
            self.tensors = load_file(file)
        except (OSError, SafetensorError) as e:
            fail(f"{file}: not a safetensors file that can be read: {e}")
        whole = self.component("unet")
        self.parts = {}
        for key, x in self.tensors.items():
            prefix = prefix_of(key)
            kind = PART_NAMES.get(prefix) or ("schedule" if whole else "first_stage")
            self.parts.setdefault(kind, {})[key.removeprefix(prefix)] = x
        kinds = {x.dtype for kind, part in self.parts.items() if kind != "schedule" for x in part.values()}
        kinds = [kind for kind in kinds if kind.is_floating_point]
        if len(kinds) != 1:
            fail(f"{file}: want one type of weights, got {', '.join(map(str, kinds)) or 'none'}")
        self.dtype = kinds[0]
        if not whole and any(key.startswith(FIRST_STAGE) for key in self.tensors):
            self.fault(f"names start with {FIRST_STAGE}: those of an autoencoder alone have no prefix")

    def json(self, path):
        """A configuration, from the header; from the folder where the header has none."""
        path = str(Path(path))
        return json.loads(self.metadata.get(f"ldm.file:{path}") or (self.folder / path).read_text())

    def component(self, *names):
        """The first of these parts that the folder has: its name. An autoencoder alone is "."."""
        if self.alone:
            return "." if "vae" in names else None
        return next((name for name in names if (self.folder / name / "config.json").is_file()), None)

    def reference(self, kind, name):
        """The folder's part, as diffusers reads it, rounded to the file's type."""
        return kind.from_pretrained(self.folder / name, local_files_only=True).to(self.dtype).float().eval()

    def load(self, module, kind, optional=()):
        """The file's tensors into an original module. All but `optional` must be there, and none may be left over."""
        part = {key: x.float() if x.is_floating_point() else x for key, x in self.parts.get(kind, {}).items()}
        want = module.state_dict()
        absent = [key for key in optional if key not in part]
        if absent:
            note(f"{kind}: {', '.join(absent)}: not in the file, and not used")
        for word, keys in (("misses", want.keys() - part.keys() - set(absent)), ("has too many", part.keys() - want.keys())):
            if keys:
                self.fault(f"{kind}: the file {word}: {', '.join(sorted(keys)[:4])}; {len(keys)} in all")
        wrong = [key for key in want.keys() & part.keys() if want[key].shape != part[key].shape]
        for key in sorted(wrong)[:4]:
            self.fault(f"{kind}: {key} has shape {list(part[key].shape)}, in the original {list(want[key].shape)}")
        if wrong or part.keys() | set(absent) != want.keys():
            return False
        module.load_state_dict(part | {key: want[key] for key in absent}, strict=True)
        module.eval()
        return True

    def compare(self, what, theirs, ours, bound=BOUND):
        """`theirs` of the original code on FILE, `ours` of diffusers on CHECKPOINT."""
        if theirs.shape != ours.shape:
            return self.fault(f"{what}: the original gives {list(theirs.shape)}, diffusers {list(ours.shape)}")
        difference, ours = (theirs.double() - ours.double()).abs(), ours.double().abs()
        worst = max(float(difference.norm() / ours.norm()), float(difference.max() / ours.max()))
        print(f"{what:28} {'x'.join(map(str, ours.shape)):16} {worst:.2e}")
        if not worst <= bound:
            self.fault(f"{what}: differs by {worst:.2e}, more than {bound:.0e}")

    def same(self, what, theirs, ours):
        """Every tensor, bit for bit. Both are dicts of modules' tensors."""
        ours = {key: x.to(self.dtype) if x.is_floating_point() else x for key, x in ours.items()}
        if theirs.keys() != ours.keys():
            return self.fault(f"{what}: other names than the folder's: {sorted(theirs.keys() ^ ours.keys())[:4]}")
        wrong = [key for key, x in theirs.items() if x.dtype != ours[key].dtype or not torch.equal(x, ours[key])]
        print(f"{what:28} {len(theirs)} tensors, {len(wrong)} differ")
        if wrong:
            self.fault(f"{what}: {len(wrong)} of {len(theirs)} differ from the folder's: {wrong[:4]}")

    def fault(self, message):
        self.faults.append(message)
        print(f"WRONG {message}")


class Inputs:
    """Drawn in f32 from one seed."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def ids(self, top, *shape):
        return torch.randint(top, shape, generator=self.generator)


def check_header(checkpoint):
    """It has every text file of the folder, and no other."""
    folder, metadata = checkpoint.folder, checkpoint.metadata
    want = {str(path.relative_to(folder)) for kind in ("*.json", "*.txt") for path in folder.rglob(kind)}
    want -= {path for path in want if path.endswith(".index.json")}
    got = {key.removeprefix("ldm.file:") for key in metadata if key.startswith("ldm.file:")}
    for path in sorted(want - got):
        checkpoint.fault(f"the header misses ldm.file:{path}")
    for path in sorted(got - want):
        checkpoint.fault(f"the header has ldm.file:{path}, which is not in {folder}")
    for path in sorted(want & got):
        ours, theirs = metadata[f"ldm.file:{path}"], (folder / path).read_text()
        if (json.loads(ours) != json.loads(theirs)) if path.endswith(".json") else (ours != theirs):
            checkpoint.fault(f"the header's ldm.file:{path} is not {folder / path}")
    others = {key: value for key, value in metadata.items() if not key.startswith("ldm.file:")}
    print(f"header: {len(want & got)} text files; {json.dumps(others, sort_keys=True)[:400]}")
    if others.get("format") != "pt":
        checkpoint.fault(f"the header's format is {others.get('format')!r}, want 'pt'")


def check_unet(checkpoint, originals, inputs):
    config = checkpoint.json("unet/config.json")
    theirs = original.original_unet(originals, config)
    if not checkpoint.load(theirs, "unet"):
        return
    ours = checkpoint.reference(getattr(diffusers, config["_class_name"]), "unet")
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    x, t = inputs.randn(2, config["in_channels"], 4 * unit, 6 * unit), torch.tensor([481, 7])
    given, named = {}, {}
    if config["_class_name"] == "UNet2DConditionModel":
        given["context"] = named["encoder_hidden_states"] = inputs.randn(2, 9, config["cross_attention_dim"])
    if config.get("num_class_embeds"):
        given["y"] = named["class_labels"] = inputs.ids(config["num_class_embeds"], 2)
    checkpoint.compare("unet", theirs(x, t, **given), ours(x, t, **named).sample)


def check_first_stage(checkpoint, originals, inputs, name):
    config = checkpoint.json(f"{name}/config.json")
    theirs = original.original_first_stage(originals, config)
    if not checkpoint.load(theirs, "first_stage"):
        return
    ours = checkpoint.reference(getattr(diffusers, config["_class_name"]), name)
    unit, name = 2 ** (len(config["block_out_channels"]) - 1), "autoencoder" if name == "." else name
    image = inputs.randn(2, config["in_channels"], 4 * unit, 6 * unit).clamp(-1, 1)
    latents = inputs.randn(2, theirs.embed_dim, 4, 6)
    if config["_class_name"] == "VQModel":
        latents *= ours.quantize.embedding.weight.std()
        checkpoint.compare(f"{name} encoder", theirs.encode(image), ours.encode(image).latents)
    else:
        checkpoint.compare(f"{name} encoder", theirs.encode(image).parameters, ours.encode(image).latent_dist.parameters)
    checkpoint.compare(f"{name} decoder", theirs.decode(latents), ours.decode(latents).sample)


def check_bert(checkpoint, originals, inputs):
    config = checkpoint.json("bert/config.json")
    theirs = original.original_bert(originals, config)
    if checkpoint.load(theirs, "cond_stage"):
        ids = inputs.ids(config["vocab_size"], 2, config["max_position_embeddings"])
        checkpoint.compare("bert", theirs(ids), checkpoint.reference(LDMBertModel, "bert")(ids).last_hidden_state)


def check_clip(checkpoint, originals, inputs):
    config, part = checkpoint.json("text_encoder/config.json"), checkpoint.parts.get("cond_stage", {})
    length = config["max_position_embeddings"]
    if any(key.startswith("model.") for key in part):
        what, optional = "text_encoder (OpenCLIP)", ("model.text_projection", "model.logit_scale")
        theirs = original.original_open_clip(originals, config, part)
        encode = theirs.encode_with_transformer
    else:
        what, optional = "text_encoder (CLIP)", ()
        theirs = original.original_clip(originals, config)
        positions = part.pop("transformer.text_model.embeddings.position_ids", None)
        if positions is not None and positions.tolist() != [list(range(length))]:
            checkpoint.fault("cond_stage: position_ids do not count from 0")

        def encode(ids):
            return theirs.transformer(input_ids=ids).last_hidden_state

    if checkpoint.load(theirs, "cond_stage", optional):
        ids = inputs.ids(config["vocab_size"], 2, length)
        ours = checkpoint.reference(transformers.CLIPTextModel, "text_encoder")
        checkpoint.compare(what, encode(ids), ours(ids).last_hidden_state)


def check_classes(checkpoint, originals, _inputs):
    config = checkpoint.json("class_embedder/config.json")
    originals.use(LDM)
    theirs = originals.module("modules.encoders.modules").ClassEmbedder(config["embed_dim"], config["n_classes"])
    if checkpoint.load(theirs, "cond_stage"):
        ours = load_file(checkpoint.folder / "class_embedder" / "diffusion_pytorch_model.safetensors")["embedding.weight"]
        ids = {"class": torch.arange(config["n_classes"])}
        checkpoint.compare("class_embedder", theirs(ids), ours.to(checkpoint.dtype).float()[:, None], bound=0.0)


def check_schedule(checkpoint, originals):
    want = original.original_schedule(originals, checkpoint.json("scheduler/scheduler_config.json"))
    got, worst = dict(checkpoint.parts.get("schedule", {})), 0.0
    # The original registers it where it measured it (`scale_by_std`), and reads it from there.
    scale, vae = got.pop("scale_factor", None), checkpoint.component("vae", "vqvae")
    if scale is not None:
        factor = checkpoint.json(f"{vae}/config.json").get("scaling_factor", 1.0) if vae else 1.0
        if scale.dtype != torch.float32 or scale.shape != () or scale != torch.tensor(factor):
            checkpoint.fault(f"scale_factor is {scale}, want the autoencoder's {factor} as a scalar of float32")
    if want.keys() != got.keys():
        return checkpoint.fault(f"schedule: missing or surplus: {', '.join(sorted(want.keys() ^ got.keys())[:12])}")
    for key, theirs in want.items():
        ours = got[key]
        if ours.dtype != torch.float32 or ours.shape != theirs.shape:
            return checkpoint.fault(f"schedule: {key} is {ours.dtype} {list(ours.shape)}, want float32 {list(theirs.shape)}")
        worst = max(worst, float(((ours.double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1e-20)).max()))
    # In f64 logarithms and powers may differ by the last bit, which rounding may show.
    print(f"{'schedule':28} {f'12 of {len(theirs)}':16} {worst:.2e}")
    if not worst <= 2**-23:
        checkpoint.fault(f"schedule: differs by {worst:.2e}, more than a unit in the last place of f32: is it computed in f64?")


def check_diffusers(checkpoint, vae, kind):
    """What diffusers reads from FILE is what it reads from the folder."""
    file, folder = str(checkpoint.file), str(checkpoint.folder)
    settings = dict(config=folder, local_files_only=True, torch_dtype=checkpoint.dtype)

    def states(**parts):
        return {f"{name}.{key}": x for name, part in parts.items() for key, x in part.state_dict().items()}

    def of_folder(kind, name):
        return kind.from_pretrained(folder, subfolder=name, local_files_only=True)

    unet, first = of_folder(diffusers.UNet2DConditionModel, "unet"), of_folder(diffusers.AutoencoderKL, vae)
    single = diffusers.UNet2DConditionModel.from_single_file(file, subfolder="unet", **settings)
    checkpoint.same("diffusers: unet", states(unet=single), states(unet=unet))
    single = diffusers.AutoencoderKL.from_single_file(file, subfolder=vae, **settings)
    checkpoint.same("diffusers: vae", states(vae=single), states(vae=first))
    if checkpoint.component("text_encoder"):
        text = of_folder(transformers.CLIPTextModel, "text_encoder")
        single = getattr(diffusers, kind).from_single_file(file, safety_checker=None, **settings)
        parts = states(unet=single.unet, vae=single.vae, text=single.text_encoder)
        checkpoint.same("diffusers: pipeline", parts, states(unet=unet, vae=first, text=text))


@torch.no_grad()
def check(a):
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    checkpoint, originals, inputs = Checkpoint(a.file, a.checkpoint), Originals(a.original), Inputs()
    check_header(checkpoint)
    unet, vae = checkpoint.component("unet"), checkpoint.component("vae", "vqvae")
    encoders = {"bert": check_bert, "text_encoder": check_clip, "class_embedder": check_classes}
    encoder = checkpoint.component(*encoders)
    schedule = unet and (checkpoint.folder / "scheduler" / "scheduler_config.json").is_file()
    wanted = {"unet": unet, "first_stage": vae, "cond_stage": encoder, "schedule": schedule}
    for kind, part in checkpoint.parts.items():
        if not wanted.get(kind):
            checkpoint.fault(f"{kind}: {len(part)} tensors stand for no part of the folder: {', '.join(sorted(part)[:4])}")
    print(f"{'part':28} {'shape':16} worst difference")
    if unet:
        check_unet(checkpoint, originals, inputs)
    if vae:
        check_first_stage(checkpoint, originals, inputs, vae)
    if encoder:
        encoders[encoder](checkpoint, originals, inputs)
    if schedule:
        check_schedule(checkpoint, originals)
    kind = "" if checkpoint.alone else checkpoint.json("model_index.json")["_class_name"]
    if unet and vae and kind.startswith("StableDiffusion"):
        check_diffusers(checkpoint, vae, kind)
    if checkpoint.faults:
        fail(f"{a.file}: {len(checkpoint.faults)} wrong")
    print("all as it should be")


def flags():
    f = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = f.add_subparsers(dest="command", required=True)
    n = commands.add_parser("names", help="of the tensors of the published configurations")
    n.add_argument("out", metavar="OUT")
    n.add_argument("--only", action="append", choices=CONFIGURATIONS, metavar="NAME", help="may be given several times")
    n.add_argument("--all", action="store_true", help="write every part in full")
    n.set_defaults(run=names)
    c = commands.add_parser("check", help="a single file that was made from a diffusers folder")
    c.add_argument("file", metavar="FILE")
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.set_defaults(run=check)
    for command in (n, c):
        command.add_argument("--original", required=True, metavar="FOLDER", help="of the checkouts")
        command.add_argument("--threads", type=int, help="of PyTorch")
    return f.parse_args()


def main():
    a = flags()
    if a.threads:
        torch.set_num_threads(a.threads)
    a.run(a)


if __name__ == "__main__":
    main()
