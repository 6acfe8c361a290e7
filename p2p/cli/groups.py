"""Groups of arguments that several commands share."""
from __future__ import annotations

import argparse
from pathlib import Path


def engine(parser: argparse.ArgumentParser) -> None:
    ap = parser.add_argument_group("where it runs")
    ap.add_argument("--engine", choices=["local", "torchrun", "ray"], default="local",
                    help="processes of this machine, ranks of torchrun, or actors of a Ray cluster")
    ap.add_argument("--workers", type=int, metavar="N", help="processes or actors (one a GPU)")
    ap.add_argument("--retry-failed", action="store_true", help="run what failed, and that alone")


def picture(ap: argparse._ActionsContainer, prompt: str) -> None:
    """prompt: the name of the argument that describes it."""
    ap.add_argument("--image", type=Path, metavar="PICTURE",
                    help=f"a picture that {prompt} describes, in place of a generated one; see real pictures")


def inversion(parser: argparse.ArgumentParser) -> None:
    ap = parser.add_argument_group("real pictures")
    ap.add_argument("--method", choices=["noise", "ddim", "fixed-point", "belm", "negative-prompt",
                                         "null-text", "direct", "edit-friendly", "uni-inv", "rf-solver",
                                         "fireflow", "rf-inversion", "flow-edit", "ddcm", "turbo-edit"],
                    help="how a picture is inverted (edit-friendly)")
    ap.add_argument("--skip", type=int, metavar="N",
                    help="leave out the N noisiest steps (0; edit-friendly: 0.24 of them; flow-edit: 0.34)")
    ap.add_argument("--inner-steps", type=int, metavar="N",
                    help="of null-text's optimiser (10) or fixed-point's solver (5)")
    ap.add_argument("--inversion-cfg", type=float, metavar="X",
                    help="guidance while inverting (1; rf-inversion: 0, without the prompt)")
    ap.add_argument("--gamma", type=float, metavar="X",
                    help="of rf-inversion: how much the way up is drawn to noise (0.5)")
    ap.add_argument("--control", type=float, metavar="X",
                    help="... and the way down to the picture (0.9)")
    ap.add_argument("--control-steps", type=float, metavar="X", help="... in this share of the steps (0.25)")
    ap.add_argument("--n-avg", type=int, metavar="N", help="of flow-edit: noises a step (1)")
    ap.add_argument("--n-min", type=int, metavar="N",
                    help="of flow-edit: how many last steps sample without the source (0)")
    ap.add_argument("--final-alpha", type=float, metavar="X",
                    help="alphas_cumprod at which the picture is taken to be; "
                    "default: the model's; 1: as O-BELM's code")
    fit = ap.add_mutually_exclusive_group()
    fit.add_argument("--fit", choices=["crop", "pad", "own"],
                     help="how a picture comes to the model's size: cropped (the "
                     "default), whole with its edges repeated around it, or in a size of its own shape")
    fit.add_argument("--pad", dest="fit", action="store_const", const="pad", help="--fit pad")


def injection(parser: argparse.ArgumentParser) -> None:
    ap = parser.add_argument_group("what is injected")
    ap.add_argument("--mode", choices=["replace", "refine", "reweight"],
                    help="default: chosen from the prompts")
    ap.add_argument("--cross", "--cross-replace-steps", action="append", metavar="[WORD=]END|START:END",
                    help="share of the steps with the source's cross-attention, for all words (0.8; less "
                    "where a thing is added or a place swapped) or for one of the target's; where words are "
                    "named, the others are injected throughout unless END is given too (or --from has it)")
    ap.add_argument("--self", "--self-replace-steps", dest="self_", metavar="END|START:END",
                    help="the same for self-attention (0.4)")
    ap.add_argument("--windows-over", choices=["run", "schedule"],
                    help="shares of the steps that are run (run), or of the whole "
                    "schedule though an inversion leaves some out, as edit-friendly's code counts")
    ap.add_argument("--weight", action="append", metavar="WORD=C", help="multiply the attention of a word")
    ap.add_argument("--renormalise", action="store_true",
                    help="divide the edited attention of every pixel by its sum (of negative weights: of "
                    "their absolute values)")
    ap.add_argument("--swap", action="append", metavar="OLD=NEW",
                    help="in an edit that also adds words: NEW takes OLD's attention")
    ap.add_argument("--scope", action="append", metavar="WORD",
                    help='word of the source that the edit is about ("cat", "cat#2"): '
                    "keep the rest of the picture")
    ap.add_argument("--blend", action="append", metavar="OLD:NEW",
                    help="change the picture only where these words attend; "
                    "OLD: or :NEW for the word of one prompt alone")
    ap.add_argument("--blend-without", action="append", metavar="OLD:NEW", help="... and not where these do")
    ap.add_argument("--blend-mask", type=Path, metavar="PICTURE",
                    help="... and only where this picture is bright")
    ap.add_argument("--blend-threshold", metavar="X[:Y]",
                    help="share of a map's maximum that counts (0.3); Y: for --blend-without")
    ap.add_argument("--blend-start", type=float, metavar="X",
                    help="share of the steps before blending begins (0.2)")
    ap.add_argument("--blend-level", type=int, metavar="N",
                    help="maps at the latents' side over this (4; of an MM-DiT, its patches')")
    ap.add_argument("--blend-keep", choices=["stored", "sampled"],
                    help="outside of the mask stands the picture as the inversion "
                    "stored it (stored), or the source as sampled, as in PnPInversion's runs")
    ap.add_argument("--blend-middle", action="store_true", default=None,
                    help="the middle block's maps count too, as in RoyiRa's "
                    "code for SDXL")
    ap.add_argument("--blend-feather", type=float, metavar="N",
                    help="latents on either side over which the mask's edge fades (2, of a picture alone "
                    "0: a hard edge, as in the official code)")
    ap.add_argument("--emphasis", choices=["attention", "embedding"],
                    help='what weights in a target, "a (red:1.3) dog", act on: attention, as --weight does '
                    "(the default), or the embedding, as in A1111 (always, in a source)")
    ap.add_argument("--layers", action="append", metavar="[cross=|self=]LAYERS",
                    help='inject into these layers alone: a part of their names ("up"), FIRST:END as shares '
                    'of depth, or several ("mid+up"); for cross- and self-attention alike, or for one')
    ap.add_argument("--aligner", choices=["exact", "official"],
                    help="official: google/prompt-to-prompt's mappers")


def for_target(parser: argparse.ArgumentParser) -> None:
    """Its values are taken out before the parser reads the others, see `parser`."""
    ap = parser.add_argument_group("one target's own")
    ap.add_argument("--for", dest="for_", metavar="N OPTION...", type=_in_full,
                    help="what is injected into target N alone, in place of what is said for all; stands "
                    'last, once for each target: p2p edit "a cat" "a dog" "a red cat" --cross 0.6 '
                    "--for 2 --cross 0.3")


def _in_full(text: str) -> None:
    raise argparse.ArgumentTypeError("write --for in full, after all other options")


def upscaling(ap: argparse._ActionsContainer) -> None:
    ap.add_argument("--upscale", action="store_true",
                    help="end in pictures four times larger, by the super-resolution stage "
                    "that ships with the model")
    ap.add_argument("--upscaler", metavar="MODEL", help="... or by this one")
    ap.add_argument("--upscale-steps", type=int, metavar="N", help="of that stage (50; bundled: 10)")
    ap.add_argument("--upscale-cfg", type=float, metavar="X", help="its guidance; default: its own")
    ap.add_argument("--upscale-level", type=int, metavar="T",
                    help="timestep of the noise on the small pictures (250; bundled: 0)")


def _seeds(text: str) -> int | list[int]:
    """N, or a list N,N,..."""
    seeds = [int(part) for part in text.split(",")]
    return seeds if len(seeds) > 1 else seeds[0]


_seeds.__name__ = "int"   # in argparse's messages


def settings(parser: argparse.ArgumentParser, seed: str, seeds: bool = False) -> None:
    ap = parser.add_argument_group("sampling")
    ap.add_argument("--steps", "--num-inference-steps", type=int,
                    help="default: the model's own (50; SD 3 Medium 28, 3.5 Large 40; of few steps, as "
                    "its file says; 4 by lcm and tcd)")
    ap.add_argument("--cfg", "--guidance-scale", type=float, default=None,
                    help="0 and 1: the prompt alone; default: the "
                    "model's own")
    ap.add_argument("--negative", action="append", metavar="PROMPT",
                    help="what guidance leads away from, in place of the empty prompt: once for all "
                    "pictures, or once for each, the source first")
    ap.add_argument("--seed", type=_seeds if seeds else int, default=None, help=seed,
                    metavar="N,..." if seeds else None)
    ap.add_argument("--eta", type=float,
                    help="0: DDIM, 1: DDPM; default: the model's own (tcd: 0.3); of an inversion by "
                    "edit-friendly or turbo-edit: above 0 (1)")
    ap.add_argument("--sampler", choices=["ddim", "dpm++", "lcm", "tcd"],
                    help="ddim, dpm++ (2M: 10 to 20 steps), or lcm and tcd for models distilled by these (4 "
                    "steps); default: what the model was made for")
    ap.add_argument("--timestep-spacing", choices=["leading", "trailing", "linspace", "karras"],
                    help="trailing: from pure noise, for models of few steps or zero terminal SNR; karras: "
                    "of dpm++; default: the model's own")
    ap.add_argument("--timesteps", metavar="T,...", help="these timesteps, falling, in place of --steps")
    ap.add_argument("--height", type=int, default=None,
                    help="of the picture, in pixels; default: what the model was made for")
    ap.add_argument("--width", type=int, default=None, help="the same")


def sampling(ap: argparse.ArgumentParser, seeds: bool = False) -> None:
    """seeds: --seed may be a list."""
    model(ap)
    settings(ap, "several: a picture for each, or one for each prompt; default: drawn, and printed" if seeds
             else "default: drawn, and printed; of an inversion that draws noise: 0", seeds)
    ap.add_argument("-o", "--out", type=Path, default=Path("out"),
                    help="folder; every run makes a new one inside (out)")
    said = ap.add_mutually_exclusive_group()
    said.add_argument("-v", "--verbose", action="store_true",
                      help="also print the UNet's rows that were computed, and seconds")
    said.add_argument("-q", "--quiet", action="store_true",
                      help="print neither progress nor files, only notes and a drawn seed")


def hide(ap: argparse.ArgumentParser, *names: str) -> None:
    """Leaves options that a command refuses, by name, out of its help."""
    for action in ap._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    ap = parser.add_argument_group("the model")
    ap.add_argument("--model", default=None,
                    help='"emoji" (bundled, the default), a Stable Diffusion file or folder, or '
                    "org/name on the Hub")
    checkpoint(ap)
    ap.add_argument("--text", type=Path, metavar="FILE|FOLDER",
                    help="of DeepFloyd IF, Stable Diffusion 3 and FLUX: prompts from p2p encode, or where T5 "
                    "lies")
    ap.add_argument("--embedding", action="append", metavar="FILE[:WORD]",
                    help="a textual inversion, and its word in prompts (as the file says, or the file's "
                    "name); may be given more than once")
    ap.add_argument("--clip-skip", type=int, metavar="N",
                    help="read the text N layers earlier (0), as diffusers counts: 1 is "
                    "A1111's \"Clip skip: 2\"")
    ap.add_argument("--dtype", choices=["float32", "float16", "bfloat16"],
                    help="default: float32 on a CPU, elsewhere as most of "
                    "the UNet is stored")
    ap.add_argument("--half-weights", action="store_true",
                    help="hold the UNet's weights in float16 and compute in --dtype: half the memory, a "
                    "little slower")
    ap.add_argument("--offload", action="store_true",
                    help="text towers and autoencoder wait on the CPU while they are idle")
    ap.add_argument("--tile", type=int, metavar="LATENTS",
                    help="decode pictures in squares of this side, for large ones (default: whole; 64 "
                    "suits Stable Diffusion)")
    ap.add_argument("--compile", action="store_true",
                    help="torch.compile the UNet: worth it for many edits on a GPU")
    device(ap)


def device(ap: argparse._ActionsContainer) -> None:
    ap.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")


def quiet(ap: argparse._ActionsContainer) -> None:
    ap.add_argument("-q", "--quiet", action="store_true",
                    help="print no progress, and no counts of what was done")


def checkpoint(ap: argparse._ActionsContainer) -> None:
    ap.add_argument("--family", choices=["sd1", "sd2", "sdxl", "sd3", "flux", "if", "emoji", "emoji-flow"],
                    help="insist on this family")
    ap.add_argument("--prediction", choices=["eps", "v", "x0", "flow"],
                    help="what the model predicts, where that was guessed wrongly")
    ap.add_argument("--vae", help="another autoencoder: a file, a diffusers folder (of the autoencoder, or "
                    "of a whole model), or org/name on the Hub")
    ap.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]",
                    help="merge a LoRA, LoHa, LoKr or the like into a model of Stable Diffusion 1, 2 or XL "
                    "(1); may be given more than once")
    ap.add_argument("--ema", action="store_true",
                    help="the averaged weights (EMA) of a file, or a folder (unet_ema), that "
                    "holds plain ones too")
    ap.add_argument("--zero-snr", action="store_true", help="stretch the noise schedule to zero terminal SNR")
