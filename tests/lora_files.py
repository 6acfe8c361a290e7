"""Random add-on files for small models, each with the change that it makes of a weight, written out densely."""
import torch
from safetensors.torch import save_file

RANK, ALPHA = 3, 5.0

# Layers of tests/families.py's small models in diffusers' names -> in those of single files (LDM, sgm).
LAYERS = {
    "sd1": {
        "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks.3.1.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "middle_block.1.transformer_blocks.0.attn1.to_out.0",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "time_embedding.linear_2": "time_embed.2",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.3.1.transformer_blocks.1.attn1.to_q",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks.1.1.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0": "middle_block.1.transformer_blocks.1.attn1.to_out.0",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "add_embedding.linear_1": "label_emb.0.0",
    },
}
LAYERS["sd2"] = LAYERS["sd1"]


def draw(g, *shape):
    return torch.randn(shape, generator=g) * 0.3


def lora(g, w, middle=False, alpha=ALPHA):
    """w (out, in) or (out, in, k, k)  ->  tensors by the ends of their keys, and the change (float64)"""
    out, inputs, *kernel = w.shape
    ones = [1] * len(kernel)
    t = {"lora_up.weight": draw(g, out, RANK, *ones), "lora_down.weight": draw(g, RANK, inputs, *(ones if middle else kernel))}
    if middle:
        t["lora_mid.weight"] = draw(g, RANK, RANK, *kernel)
    up, down = t["lora_up.weight"].double().reshape(out, RANK), t["lora_down.weight"].double()
    change = torch.zeros(w.shape, dtype=torch.float64)
    for i in range(RANK):
        if middle:
            for j in range(RANK):
                change += up[:, i, None, None, None] * down[j].reshape(inputs, 1, 1) * t["lora_mid.weight"][i, j].double()
        else:
            change += up[:, i].reshape(out, 1, *ones) * down[i]
    if alpha is not None:
        t["alpha"] = torch.tensor(alpha)
    return t, change * ((RANK if alpha is None else alpha) / RANK)


def loha(g, w, middle=False):
    out, inputs, *kernel = w.shape
    t, factors = {"alpha": torch.tensor(ALPHA)}, []
    for i in "12":
        if middle:
            a, b, core = draw(g, RANK, out), draw(g, RANK, inputs), draw(g, RANK, RANK, *kernel)
            t[f"hada_t{i}"] = core
            factors.append(torch.einsum("ijkl,jc,io->ockl", core.double(), b.double(), a.double()))
        else:
            a, b = draw(g, out, RANK), draw(g, RANK, w[0].numel())
            factors.append((a.double() @ b.double()).reshape(w.shape))
        t |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
    return t, factors[0] * factors[1] * ALPHA / RANK


def lokr(g, w, first=False, second=False, middle=False, flat=True):
    """first, second: whether these factors are factorised themselves."""
    out, inputs, *kernel = w.shape
    a, c, b, d = 2, 2, out // 2, inputs // 2
    t = {"alpha": torch.tensor(ALPHA)}
    if first:
        t |= {"lokr_w1_a": draw(g, a, RANK), "lokr_w1_b": draw(g, RANK, c)}
        one = t["lokr_w1_a"].double() @ t["lokr_w1_b"].double()
    else:
        t["lokr_w1"] = draw(g, a, c)
        one = t["lokr_w1"].double()
    if middle:
        t |= {"lokr_w2_a": draw(g, RANK, b), "lokr_w2_b": draw(g, RANK, d), "lokr_t2": draw(g, RANK, RANK, *kernel)}
        other = torch.einsum("ijkl,jd,ib->bdkl", t["lokr_t2"].double(), t["lokr_w2_b"].double(), t["lokr_w2_a"].double())
    elif second:
        t |= {"lokr_w2_a": draw(g, b, RANK), "lokr_w2_b": draw(g, RANK, d, *kernel)}
        other = torch.tensordot(t["lokr_w2_a"].double(), t["lokr_w2_b"].double(), 1)
        if flat:
            t["lokr_w2_b"] = t["lokr_w2_b"].flatten(1).contiguous()
    else:
        t["lokr_w2"] = draw(g, b, d, *kernel)
        other = t["lokr_w2"].double()
    change = torch.zeros(w.shape, dtype=torch.float64)
    for i in range(a):
        for j in range(c):
            change[i * b:(i + 1) * b, j * d:(j + 1) * d] = one[i, j] * other
    return t, change * (ALPHA / RANK if first or second or middle else 1)


def difference(g, w):
    diff = draw(g, *w.shape)
    return {"diff": diff}, diff.double()


KINDS = {   # -> those for convolutions of 3 x 3 alone, last
    "LoRA": lora, "LoRA without alpha": lambda g, w: lora(g, w, alpha=None), "LoHa": loha, "LoKr, whole": lokr,
    "LoKr, first": lambda g, w: lokr(g, w, first=True), "LoKr, second": lambda g, w: lokr(g, w, second=True),
    "LoKr, both": lambda g, w: lokr(g, w, True, True), "LoKr, not flat": lambda g, w: lokr(g, w, second=True, flat=False),
    "difference": difference,
    "LoCon with a middle": lambda g, w: lora(g, w, True), "LoHa with middles": lambda g, w: loha(g, w, True),
    "LoKr with a middle": lambda g, w: lokr(g, w, middle=True), "LoKr, first and a middle": lambda g, w: lokr(g, w, True, middle=True),
}


def dora(g, w, change, side, m=1.0):
    """-> d, and the weight that it makes (float64): norms of what each output takes, or each input gives"""
    out, inputs, *kernel = w.shape
    merged = w.double() + m * change
    if side == "outputs":
        norms = torch.stack([row.norm() for row in merged]).reshape(out, *[1] * (w.ndim - 1))
    else:
        norms = torch.stack([merged[:, i].norm() for i in range(inputs)]).reshape(1, inputs, *[1] * len(kernel))
    d = norms.float() * (1 + 0.3 * torch.rand(norms.shape, generator=g))
    return d, merged * (1 + m * (d.double() / norms - 1))


def write(path, layers, prefix="lora_unet_", joined=True, **kw):
    """layers: {layer: tensors by the ends of their keys}"""
    state = {f"{prefix}{layer.replace('.', '_') if joined else layer}.{end}": tensor
             for layer, tensors in layers.items() for end, tensor in tensors.items()}
    save_file(state, path, **kw)
    return path
