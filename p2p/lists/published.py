"""Figures that others published for PIE-Bench's 700 pictures, in the units of the published tables, and
their sources.

Tables disagree between papers for the same method: settings and masks differ. Compare within one source.
"""
from __future__ import annotations

from typing import NamedTuple

from p2p.lists.metrics import COLUMNS

SOURCES = {
    "PnPInversion": "the table of inversions and editors in the README of cure-lab/PnPInversion (Ju et al. "
    "2023); null-text is the mean of its rows for A800 and 3090",
    "InfEdit": "arXiv 2312.04965, as listed by paperswithcode",
    "ViMAEdit": "the README of ViMAEdit",
    "FireFlow": "the table of the FireFlow paper",
    "UniEdit": "the table of the UniEdit-Flow paper",
    "SplitFlow": "the table of the SplitFlow paper",
    "DNAEdit": "the table of the DNAEdit paper",
    "DirectEdit": "the table of the DirectEdit paper",
}


class Published(NamedTuple):
    name: str                      # as in `protocol.PUBLISHED`, if it has the method
    model: str
    figures: dict[str, float]      # by COLUMNS, those that were published
    source: str                    # of SOURCES


_ROWS = """
ddim+p2p                       | SD1.4 | 69.43 17.87 208.80 219.88 71.14 25.01 22.44 | PnPInversion
null-text-inversion+p2p        | SD1.4 | 13.44 27.03  60.67  35.86 84.11 24.75 21.86 | PnPInversion
negative-prompt-inversion+p2p  | SD1.4 | 16.17 26.21  69.01  39.73 83.40 24.61 21.87 | PnPInversion
stylediffusion+p2p             | SD1.4 | 11.65 26.05  66.10  38.63 83.42 24.78 21.72 | PnPInversion
directinversion+p2p            | SD1.4 | 11.65 27.22  54.55  32.86 84.76 25.02 22.10 | PnPInversion
ddim+masactrl                  | SD1.4 | 28.38 22.17 106.62  86.97 79.67 23.96 21.16 | PnPInversion
directinversion+masactrl       | SD1.4 | 24.70 22.64  87.94  81.09 81.33 24.38 21.35 | PnPInversion
ddim+pix2pix-zero              | SD1.4 | 61.68 20.44 172.22 144.12 74.67 22.80 20.54 | PnPInversion
directinversion+pix2pix-zero   | SD1.4 | 49.22 21.53 138.98 127.32 77.05 23.31 21.05 | PnPInversion
ddim+pnp                       | SD1.5 | 28.22 22.28 113.46  83.64 79.05 25.41 22.55 | PnPInversion
directinversion+pnp            | SD1.5 | 24.29 22.46 106.06  80.45 79.68 25.41 22.62 | PnPInversion
directinversion+p2p            | SD1.4 | 11.64 27.19  54.44  33.15 84.71 25.03 22.13 | ViMAEdit
InfEdit, unified attention     | LCM   | 13.78 28.51  47.58      -     - 25.03     - | InfEdit
InfEdit, p2p                   | LCM   | 14.22     -      -      -     - 24.89     - | InfEdit
InfEdit                        | LCM   | 19.31 27.31  56.32  47.80 85.30 24.90 22.14 | DNAEdit
InstructPix2Pix                | SD1.5 | 58.13 20.80 159.23 221.3  76.47 23.61 21.68 | DNAEdit
TurboEdit                      | SDXL-Turbo | - 29.52  44.74  26.08 91.59     -     - | ViMAEdit
RF-Inversion                   | FLUX  | 40.6  20.82      -      - 71.92 25.20 22.11 | FireFlow
RF-Inversion                   | FLUX  | 42.29 20.20 179.54 139.2  69.91 24.57 22.20 | DNAEdit
RF-Solver                      | FLUX  | 31.1  22.90      -      - 81.90 26.00 22.88 | FireFlow
RF-Solver                      | FLUX  | 21.79 24.83 113.15  52.46 83.38 25.57 22.26 | DNAEdit
FireFlow, 8 steps              | FLUX  | 27.1  23.03      -      - 82.49 26.02 22.81 | FireFlow
FireFlow, 15 steps             | FLUX  | 28.3  23.28      -      - 82.82 25.98 22.94 | FireFlow
FlowEdit                       | SD3   | 27.24 22.13 105.46      - 83.48 26.83 23.67 | SplitFlow
FlowEdit                       | FLUX  | 27.82 21.96 112.19  94.99 83.08 25.25 22.58 | DNAEdit
FTEdit                         | SD3.5-L | 18.17 26.62 80.55 40.24 91.50 25.74 22.27 | DNAEdit
SplitFlow                      | SD3   | 25.96 22.45 102.14      - 83.91 26.96 23.83 | SplitFlow
SplitFlow, marked with a dagger | SD3   | 14.55 25.22  68.53      - 87.54 26.23 23.01 | SplitFlow
Uni-Edit (15, 0.6)             | SD3   | 21.40 24.96      -      -     - 26.39 22.72 | UniEdit
Uni-Edit (15, 0.8)             | FLUX  | 26.85 24.10      -      -     - 26.97 23.51 | UniEdit
Uni-Edit (15, 0.6)             | FLUX  | 10.14 29.54      -      -     - 25.80 22.33 | UniEdit
DNAEdit                        | FLUX  | 18.87 24.99  95.06  50.45 85.71 25.79 22.87 | DNAEdit
DNAEdit                        | SD3.5-M | 14.19 26.66 74.57 32.76 88.63 25.63 22.71 | DNAEdit
DirectEdit                     | FLUX  | 17.94 32.63  35.45  25.05     - 25.39     - | DirectEdit
DirectEdit                     | SD3.5 | 14.65 31.82  31.36  21.64     - 25.64     - | DirectEdit
iRFDS                          | SD3   | 62.72 19.61 186.39      - 74.59 24.54 21.67 | SplitFlow
"""


def _read(line: str) -> Published:
    name, model, figures, source = (part.strip() for part in line.split("|"))
    values = zip(COLUMNS, figures.split(), strict=True)
    return Published(name, model, {c: float(v) for c, v in values if v != "-"}, source)


FIGURES = [_read(line) for line in _ROWS.strip().splitlines()]
