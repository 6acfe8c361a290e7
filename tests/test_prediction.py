"""What a checkpoint predicts and over which noise schedule: said by argument, file or folder, or guessed and noted."""
import json

import families
import pytest
import torch
from oracles import diffusers
from safetensors.torch import load_file, save_file
from test_checkpoints import load

from p2p import CheckpointError
from p2p.weights import keys
from p2p.weights.convert import convert, single_file
from p2p.weights.detect import scaled_linear, zero_terminal_snr
from p2p.weights.load import find


@pytest.mark.slow
def test_prediction_by_order(single, tmp_path):
    """argument > yaml beside it > marker tensor > metadata > guess; a guess is said."""
    state = load_file(single)
    sd2 = any(k.startswith(keys.TEXT_SD2) for k in state)
    path = tmp_path / "m.safetensors"

    def saved(extra=None, **metadata):
        save_file(state | (extra or {}), path, metadata or None)
        return find(path)

    plain = saved()
    assert ("guess" in plain.why) == sd2
    assert any("guess" in n for n in load(path).notes) == sd2
    assert saved(**{"modelspec.prediction_type": "v_prediction"}).prediction == "v"
    assert saved({"v_pred": torch.zeros(0)}, **{"modelspec.prediction_type": "epsilon"}).prediction == "v"
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "eps"\n')
    assert saved({"v_pred": torch.zeros(0)}).prediction == "eps"
    assert find(path, prediction="v").prediction == "v"
    scaling = "model:\n  params:\n    scaling_config:\n      target: sgm.modules.diffusionmodules.denoiser_scaling.%s\n    x:\n      target: y\n"
    for name, wanted in (("VScaling", "v"), ("EpsScaling", "eps")):
        path.with_suffix(".yaml").write_text(scaling % name)
        found = saved()
        assert (found.prediction, found.why) == (wanted, "m.yaml beside it")
    path.with_suffix(".yaml").write_text(scaling % "EDMScaling")
    with pytest.raises(CheckpointError, match="EDMScaling"):
        saved()


@pytest.mark.slow
def test_guess_for_sd2_follows_one_bias(tmp_path):
    parts = families.build("sd2")
    state = single_file(find(families.save(parts, tmp_path / "folder", "sd2")))
    for spread, want in ((0.02, "eps"), (0.5, "v")):
        key = max(k for k in state if "output_blocks" in k and k.endswith("1.transformer_blocks.0.norm1.bias"))
        state[key] = torch.linspace(-1, 1, len(state[key])) * spread
        save_file(state, tmp_path / "m.safetensors")
        found = find(tmp_path / "m.safetensors")
        assert found.prediction == want and "guess" in found.why and found.size == ((768,) * 2 if want == "v" else (512,) * 2)


@pytest.mark.slow
def test_scheduler_config_says_prediction(made, tmp_path):
    family, parts, folder = made
    other = families.save(parts, tmp_path / "v", family, prediction="v_prediction")
    assert find(other).prediction == "v" and find(folder).prediction == "eps"
    assert find(other).why == "scheduler_config.json"


@pytest.mark.slow
def test_a_file_of_sdxl_is_marked_for_programs_that_read_no_metadata(made, tmp_path):
    """As ComfyUI reads it; read again, here too, it is the same model."""
    family, parts, _ = made
    folder = families.save(parts, tmp_path / "v", family, prediction="v_prediction")
    said = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    for zero in (False, True):
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(said | {"rescale_betas_zero_snr": zero}))
        file = tmp_path / f"{zero}.safetensors"
        convert(find(folder), file)
        wanted = {"v_pred"} | ({"ztsnr"} if zero else set()) if family == "sdxl" else set()
        assert {"v_pred", "ztsnr"} & load_file(file).keys() == wanted
        again, alone = find(file), tmp_path / f"alone-{zero}.safetensors"
        assert again.prediction == "v" and torch.equal(again.alphas_cumprod, find(folder).alphas_cumprod)
        save_file(load_file(file), alone)   # without its metadata
        if family == "sdxl":
            assert find(alone).prediction == "v" and (find(alone).alphas_cumprod[-1] == 0) == zero


def test_zero_terminal_snr(single, tmp_path):
    save_file(load_file(single) | {"ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    abar = find(tmp_path / "z.safetensors").alphas_cumprod
    assert abar[-1] == 0 and torch.allclose(abar[0], scaled_linear()[0]) and torch.equal(abar, zero_terminal_snr(scaled_linear()))
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert (abar[:-1] - theirs.alphas_cumprod[:-1]).abs().max() < 1e-5
