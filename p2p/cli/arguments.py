"""The arguments of every command, as argparse takes them."""
from __future__ import annotations

import argparse
from pathlib import Path


def edit(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("source", nargs="?", help="prompt of the picture to be edited")
    ap.add_argument("targets", nargs="*", metavar="TARGET", help="prompts of the edited pictures")
    ap.add_argument("--image", type=Path, metavar="PICTURE",
                    help="a picture that SOURCE describes, to be edited")
    ap.add_argument("--inversion", type=Path, metavar="FILE",
                    help="the same, inverted before by p2p invert; SOURCE is left out")
    ap.add_argument("--from", dest="replay", type=Path, metavar="PNG",
                    help="run the edit again that made this picture")
    ap.add_argument("--editor", choices=["masactrl", "plug-and-play"],
                    help="inject in another way than Prompt-to-Prompt, whose "
                    "windows and weights then do not count")
    ap.add_argument("--upscale", action="store_true",
                    help="end in pictures four times larger, by the super-resolution stage "
                    "that ships with the model")
    ap.add_argument("--upscaler", metavar="MODEL", help="... or by this one")
    ap.add_argument("--upscale-steps", type=int, metavar="N", help="of that stage (50; bundled: 10)")
    ap.add_argument("--upscale-cfg", type=float, metavar="X", help="its guidance; default: its own")
    ap.add_argument("--upscale-level", type=int, metavar="T",
                    help="timestep of the noise on the small pictures (250; bundled: 0)")
    ap.add_argument("--upscale-edited", action="store_true", help="inject the source's attention there too")
    ap.add_argument("--proximal", metavar="NORM[:QUANTILE]",
                    help="guide along the largest differences alone: l0, l1, or published "
                    "and published-l1, which compute what ProxEdit's code does (quantile 0.7)")
    ap.add_argument("--report", action="store_true",
                    help="also write report.html: pictures, attention maps, settings, timings")
    ap.add_argument("--leakage", action="store_true",
                    help="measure what changed that the edit is not about (always with --scope)")
    inversion(ap)
    injection(ap)
    sampling(ap)


def invert(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("image", type=Path, metavar="PICTURE")
    ap.add_argument("source", metavar="PROMPT", help="what it shows")
    inversion(ap)
    sampling(ap)


def generate(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="+", metavar="PROMPT")
    sampling(ap)


def maps(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompt", metavar="PROMPT")
    ap.add_argument("targets", nargs="*", metavar="TARGET",
                    help="edits of it: their maps before and after injection")
    ap.add_argument("--ends", action="store_true", help="also the start and the end token")
    ap.add_argument("--components", action="store_true",
                    help="also the principal components of self-attention")
    ap.add_argument("--arrays", action="store_true", help="also all maps as numbers, maps.npz")
    ap.add_argument("--at", dest="steps_range", metavar="STEP|FIRST:END", help="mean of these steps alone")
    ap.add_argument("--head", type=int, action="append", metavar="N", help="mean of these heads alone")
    ap.add_argument("--site", metavar="NAME", help='layers whose name holds this: "down", "mid", "up"')
    ap.add_argument("--side", type=int,
                    help="maps of this height; default: a quarter of the latents', or the largest")
    ap.add_argument("--max-tokens", type=int, default=32 * 32,
                    help="record maps of at most so many pixels (1024)")
    injection(ap)
    sampling(ap)


def sweep(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("source")
    ap.add_argument("target")
    ap.add_argument("--over", action="append", required=True, metavar="NAME=VALUE,...",
                    help="cross and self (END or START:END, as --cross and --self say), weight:WORD or seed; "
                    "the first given along the columns, a second along the rows")
    injection(ap)
    sampling(ap)


def batch(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("jobs", type=Path, metavar="JOBS", help="a .jsonl file, or one JSON array")
    engine(ap)
    ap.add_argument("--together", type=int, default=4, metavar="N",
                    help="at most so many jobs in one batch of the network (4)")
    ap.add_argument("--editor", choices=["masactrl", "plug-and-play"], help="as for edit")
    ap.add_argument("--proximal", metavar="l0|l1[:QUANTILE]", help="as for edit")
    inversion(ap)
    injection(ap)
    model(ap)
    settings(ap, seed="default: 0")
    ap.add_argument("-o", "--out", type=Path, required=True, help="the folder of the results")
    ap.add_argument("-q", "--quiet", action="store_true")


def evaluate(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("benchmark", choices=["pie"])
    ap.add_argument("--data", type=Path, required=True,
                    help="its folder: mapping_file.json and annotation_images/")
    ap.add_argument("-o", "--out", type=Path, required=True,
                    help="the folder of the results; started again, it goes on")
    ap.add_argument("--methods", metavar="NAME,...", help="rows, see above (edit-friendly)")
    ap.add_argument("--editors", metavar="NAME,...",
                    help="of corrected rows: p2p, masactrl, plug-and-play (p2p)")
    ap.add_argument("--ways", type=Path, metavar="FILE.json",
                    help='rows of your own: {"NAME": {settings of a job, as in a list for p2p batch; "like": '
                    "a row to begin with}, ...}")
    ap.add_argument("--pictures", action="append", metavar="NAME=FOLDER",
                    help="a row of finished pictures from another program: KEY.png, or by the names of the "
                    "benchmark's pictures")
    ap.add_argument("--strips", action="store_true",
                    help="... which are strips of panels, as PnPInversion saves them: the last one counts")
    ap.add_argument("--compare", choices=["published"], help="print the published figures beside")
    ap.add_argument("--cross", metavar="END|START:END",
                    help="share of the steps with the source's cross-attention (0.4)")
    ap.add_argument("--self", dest="self_", metavar="END|START:END", help="the same for self-attention (0.6)")
    ap.add_argument("--no-blend", action="store_true", help="edit everywhere, and weigh no word")
    ap.add_argument("--lpips", type=Path, metavar="FILE", help="torchvision's weights of squeezenet1_1")
    ap.add_argument("--clip", type=Path, metavar="FILE", help="open_clip's weights of OpenAI's ViT-L/14")
    ap.add_argument("--dino", type=Path, metavar="FILE",
                    help="timm's weights of vit_base_patch8_224.dino: structure")
    ap.add_argument("--limit", type=int, metavar="N", help="the first N pictures alone")
    ap.add_argument("--types", metavar="ID,...", help="pictures of these editing types alone")
    ap.add_argument("--steps", type=int,
                    help="50; given for a published row, as all options of sampling, it is named so")
    ap.add_argument("--cfg", type=float, help="published: 7.5; corrected: the model's own")
    ap.add_argument("--seed", type=int, help="published: 1234; corrected: 0")
    engine(ap)
    model(ap)
    ap.add_argument("-q", "--quiet", action="store_true")


def dataset(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", type=Path, metavar="PROMPTS", help="a .jsonl file")
    ap.add_argument("--recipe", choices=["ip2p", "p2p"], required=True,
                    help="ip2p: samples and filters as in InstructPix2Pix's generate_img_dataset.py (Euler "
                    "ancestral, only self-attention injected, all samples drawn); p2p: the same filters, but "
                    "pairs by Prompt-to-Prompt, and no more of them once enough have passed")
    ap.add_argument("-o", "--out", type=Path, required=True,
                    help="the folder of the pairs; started again, it goes on")
    ap.add_argument("--clip", type=Path, metavar="FILE",
                    help="open_clip's weights of OpenAI's ViT-L/14, for the filters; the bundled model is "
                    "read by its recogniser")
    ap.add_argument("--samples", type=int, default=100, help="of a prompt (100); with p2p at most")
    ap.add_argument("--keep", type=int, default=4, help="of these (4)")
    ap.add_argument("--steps", type=int, default=100, help="(100)")
    ap.add_argument("--together", type=int, default=4, metavar="N",
                    help="samples in one batch of the network (4)")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--min-image", type=float, metavar="X",
                    help="filter: least similarity of the pictures (0.7; by the "
                    "recogniser, for which another object is a third of a picture, 0.5)")
    ap.add_argument("--min-direction", type=float, default=0.2, metavar="X",
                    help="... of their difference and the captions' (0.2)")
    ap.add_argument("--min-text", type=float, default=0.2, metavar="X",
                    help="... of each picture and its caption (0.2)")
    ap.add_argument("--format", choices=["folders", "webdataset", "parquet"], default="folders",
                    help="written beside the folders")
    model(ap)
    ap.add_argument("-q", "--quiet", action="store_true")


def tokens(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="+", metavar="PROMPT")


def encode(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="+", metavar="PROMPT")
    ap.add_argument("--model", required=True, help="the folder in which T5 lies (text_encoder, tokenizer)")
    ap.add_argument("-o", "--out", type=Path, default=Path("out"),
                    help="folder; every run makes a new one inside (out)")
    ap.add_argument("--device", default=None)
    ap.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def inspect(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("file", help="a .safetensors or .ckpt file, a diffusers folder, or org/name on the Hub")
    ap.add_argument("--hash", action="store_true", help="also its sha256")
    checkpoint(ap)


def convert(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("file", metavar="IN", help="as for inspect")
    ap.add_argument("out", metavar="OUT", type=Path,
                    help="a .safetensors file, or a new folder in the layout of diffusers")
    ap.add_argument("--half", action="store_true", help="in float16")
    checkpoint(ap)


# ----------------------------------------------------------------------------------------- shared by commands

def engine(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--engine", choices=["local", "torchrun", "ray"], default="local",
                    help="processes of this machine, ranks of torchrun, or actors of a Ray cluster")
    ap.add_argument("--workers", type=int, metavar="N", help="processes or actors (one a GPU)")
    ap.add_argument("--retry-failed", action="store_true", help="run what failed, and that alone")


def inversion(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--method", choices=["noise", "ddim", "fixed-point", "belm", "negative-prompt",
                                         "null-text", "direct", "edit-friendly"],
                    help="how a picture is inverted (edit-friendly)")
    ap.add_argument("--skip", type=int, metavar="N",
                    help="leave out the N noisiest steps (noise: 0; edit-friendly: 0.24 of them)")
    ap.add_argument("--inner-steps", type=int, metavar="N",
                    help="of null-text's optimiser (10) or fixed-point's solver (5)")
    ap.add_argument("--inversion-cfg", type=float, metavar="X", help="guidance while inverting (1)")
    ap.add_argument("--final-alpha", type=float, metavar="X",
                    help="alphas_cumprod at which the picture is taken to be; "
                    "default: the model's; 1: as O-BELM's code")
    fit = ap.add_mutually_exclusive_group()
    fit.add_argument("--fit", choices=["crop", "pad", "own"],
                     help="how a picture comes to the model's size: cropped (the "
                     "default), whole with its edges repeated around it, or in a size of its own shape")
    fit.add_argument("--pad", dest="fit", action="store_const", const="pad", help="--fit pad")


def injection(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--mode", choices=["replace", "refine", "reweight"],
                    help="default: chosen from the prompts")
    ap.add_argument("--cross", "--cross-replace-steps", action="append", metavar="[WORD=]END|START:END",
                    help="share of the steps with the source's cross-attention, for all words (0.8) or for "
                    "one of the target's; where words are named, the others are injected throughout unless "
                    "END is given too")
    ap.add_argument("--self", "--self-replace-steps", dest="self_", metavar="END|START:END",
                    help="the same for self-attention (0.4)")
    ap.add_argument("--windows-over", choices=["run", "schedule"],
                    help="shares of the steps that are run (run), or of the whole "
                    "schedule though an inversion leaves some out, as edit-friendly's code counts")
    ap.add_argument("--weight", action="append", metavar="WORD=C", help="multiply the attention of a word")
    ap.add_argument("--renormalise", action="store_true",
                    help="let the edited attention of every pixel sum to 1 again")
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
    ap.add_argument("--blend-level", type=int, metavar="N", help="maps at the latents' side over this (4)")
    ap.add_argument("--blend-keep", choices=["stored", "sampled"],
                    help="outside of the mask stands the picture as the inversion "
                    "stored it (stored), or the source as sampled, as in PnPInversion's runs")
    ap.add_argument("--blend-middle", action="store_true", default=None,
                    help="the middle block's maps count too, as in RoyiRa's "
                    "code for SDXL")
    ap.add_argument("--aligner", choices=["exact", "official"],
                    help="official: google/prompt-to-prompt's mappers")


def settings(ap: argparse.ArgumentParser, seed: str) -> None:
    ap.add_argument("--steps", "--num-inference-steps", type=int, help="default: 50")
    ap.add_argument("--cfg", "--guidance-scale", type=float, default=None,
                    help="0 and 1: the prompt alone; default: the "
                    "model's own")
    ap.add_argument("--negative", metavar="PROMPT",
                    help="what guidance leads away from, in place of the empty prompt")
    ap.add_argument("--seed", type=int, default=None, help=seed)
    ap.add_argument("--eta", type=float,
                    help="0: DDIM, 1: DDPM; default: the model's own; of an edit-friendly "
                    "inversion: above 0 (1)")
    ap.add_argument("--height", type=int, default=None,
                    help="of the picture, in pixels; default: what the model was made for")
    ap.add_argument("--width", type=int, default=None)


def sampling(ap: argparse.ArgumentParser) -> None:
    model(ap)
    settings(ap, seed="default: drawn, and printed; of an inversion that draws noise: 0")
    ap.add_argument("-o", "--out", type=Path, default=Path("out"),
                    help="folder; every run makes a new one inside (out)")
    said = ap.add_mutually_exclusive_group()
    said.add_argument("-v", "--verbose", action="store_true",
                      help="also print the UNet's rows that were computed, and seconds")
    said.add_argument("-q", "--quiet", action="store_true",
                      help="print neither progress nor files, only notes and a drawn seed")


def model(ap: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    ap.add_argument("--model", default=None,
                    help='"emoji" (bundled, the default), a Stable Diffusion file or folder, or '
                    "org/name on the Hub")
    checkpoint(ap)
    ap.add_argument("--text", type=Path, metavar="FILE|FOLDER",
                    help="of DeepFloyd IF: prompts from p2p encode, or where T5 lies")
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
                    help="decode pictures in squares of this side (64), for large ones")
    ap.add_argument("--compile", action="store_true",
                    help="torch.compile the UNet: worth it for many edits on a GPU")
    ap.add_argument("--device", default=None)


def checkpoint(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--family", choices=["sd1", "sd2", "sdxl", "if", "emoji"], help="insist on this family")
    ap.add_argument("--prediction", choices=["eps", "v", "x0"],
                    help="what the model predicts, where that was guessed wrongly")
    ap.add_argument("--vae", help="another autoencoder: a file, a diffusers folder (of the autoencoder, or "
                    "of a whole model), or org/name on the Hub")
    ap.add_argument("--ema", action="store_true",
                    help="the averaged weights (EMA) of a file, or a folder (unet_ema), that "
                    "holds plain ones too")
    ap.add_argument("--zero-snr", action="store_true", help="stretch the noise schedule to zero terminal SNR")
