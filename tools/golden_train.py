"""Gradients and loss curves of the small checkpoints from PyTorch autograd: tests/golden/train/*.safetensors.

    python tools/golden_train.py [unet] [kl] [unconditional]

torch 2.11, diffusers 0.37.1, f32 on the CPU. For each parameter of the model (in the names and axes of its checkpoint): the norm
of its gradient, and up to 256 of its elements, those at i · 7919 mod n. The losses of AdamW steps with one thread are recorded,
and by how much two threads, and the same steps in f64, differ from them (rounding grows from step to step).
"""

import copy
import pathlib
import sys

import diffusers
import torch
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden"
SAMPLES = 256
STEPS = 100


def sampled(x):
    flat = x.flatten()
    n = flat.numel()
    count = min(n, SAMPLES)
    at = torch.arange(count) * 7919 % n if n > SAMPLES else torch.arange(n)
    return flat[at].contiguous()


def gradients(model):
    out = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        out[f"grad.{name}"] = sampled(p.grad)
        out[f"norm.{name}"] = p.grad.norm().reshape(1)
    return out


def curve(model, loss, threads, rate, dtype=torch.float32):
    torch.set_num_threads(threads)
    model = copy.deepcopy(model).to(dtype)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    losses = []
    for step in range(STEPS):
        optimiser.zero_grad()
        value = loss(model, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(value.item())
    return torch.tensor(losses)


def write(name, tensors, metadata):
    metadata = {"torch": torch.__version__, "diffusers": diffusers.__version__, **metadata}
    save_file({k: v.contiguous() for k, v in tensors.items()}, GOLDEN / "train" / f"{name}.safetensors", metadata)


def record(name, model, inputs, loss, rate):
    torch.set_num_threads(1)
    model.zero_grad()
    value = loss(model, 0)
    value.backward()
    tensors = {**inputs, **gradients(model), "loss": value.detach().reshape(1)}
    one, two = curve(model, loss, 1, rate), curve(model, loss, 2, rate)
    exact = curve(model, loss, 2, rate, torch.float64)
    tensors["curve"] = one
    differs = max(((one - other).abs() / one.abs()).max().item() for other in (two, exact))
    write(name, tensors, {"differs": str(differs), "rate": str(rate)})
    print(name, value.item(), one[-1].item(), differs)


def unet():
    model = diffusers.UNet2DConditionModel.from_pretrained(GOLDEN / "sd15-tiny" / "unet", torch_dtype=torch.float32)
    model.train()
    g = torch.Generator().manual_seed(1)
    sets = 4
    x = torch.randn(sets, 2, 4, 16, 16, generator=g)
    target = torch.randn(sets, 2, 4, 16, 16, generator=g)
    context = torch.randn(sets, 2, 9, 32, generator=g)
    t = torch.randint(0, 1000, (sets, 2), generator=g)

    def loss(model, step):
        k = step % sets
        to = model.dtype
        y = model(x[k].to(to), t[k], context[k].to(to), return_dict=False)[0]
        return torch.nn.functional.mse_loss(y, target[k].to(to))

    # Pictures channels last, as the engine has them.
    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("unet", model, {"x": last(x), "target": last(target), "context": context, "t": t.float()}, loss, 1e-4)


def kl():
    model = diffusers.AutoencoderKL.from_pretrained(GOLDEN / "sd15-tiny" / "vae", torch_dtype=torch.float32)
    model.train()
    g = torch.Generator().manual_seed(2)
    sets = 4
    x = torch.rand(sets, 2, 3, 32, 32, generator=g) * 2 - 1
    shape = model.encode(x[0]).latent_dist.mean.shape
    noise = torch.randn(sets, *shape, generator=g)

    def loss(model, step):
        k = step % sets
        to = model.dtype
        d = model.encode(x[k].to(to)).latent_dist
        y = model.decode(d.mean + d.std * noise[k].to(to), return_dict=False)[0]
        return torch.nn.functional.l1_loss(y, x[k].to(to)) + 1e-4 * d.kl().mean()

    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("kl", model, {"x": last(x), "noise": last(noise)}, loss, 4.5e-5)


def unconditional():
    torch.manual_seed(4)
    model = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(GOLDEN / "uncond-tiny" / "unet")
    model.train()
    g = torch.Generator().manual_seed(3)
    sets = 4
    x = torch.randn(sets, 2, 3, 16, 16, generator=g)
    target = torch.randn(sets, 2, 3, 16, 16, generator=g)
    t = torch.randint(0, 1000, (sets, 2), generator=g)

    def loss(model, step):
        k = step % sets
        y = model(x[k].to(model.dtype), t[k], return_dict=False)[0]
        return torch.nn.functional.huber_loss(y, target[k].to(model.dtype), delta=0.5)

    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("unet_2d", model, {"x": last(x), "target": last(target), "t": t.float()}, loss, 1e-4)


for part in sys.argv[1:] or ["unet", "kl", "unconditional"]:
    {"unet": unet, "kl": kl, "unconditional": unconditional}[part]()
