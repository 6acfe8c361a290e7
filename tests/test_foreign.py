"""Files of other kinds are named for what they are, in a short message, before anything of them is loaded."""
import pytest
import torch
from safetensors.torch import load_file, save_file

from p2p import CheckpointError
from p2p.weights import keys
from p2p.weights.load import find

U, LAYER = keys.UNET, "lora_unet_mid_block_attentions_0_proj_in"
NAMES = {   # tensors' names and shapes -> what the message calls them
    "a textual-inversion embedding": [
        {"<cat>": (768,)}, {"<cat>": (1024,)}, {"<cat>": (2, 768)}, {"emb_params": (4, 1024)}, {"clip_l": (2, 768), "clip_g": (2, 1280)},
        {"clip_l": (768,), "clip_g": (1280,)}],
    "an IP-Adapter": [{"image_proj.proj.weight": (9, 9), "ip_adapter.1.to_k_ip.weight": (9, 9)}],
    "a LoRA:": [
        {f"{LAYER}.lora_down.weight": (4, 9), f"{LAYER}.lora_up.weight": (9, 4), f"{LAYER}.alpha": ()},
        {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 9)}, {"unet.mid_block.to_q.lora.down.weight": (4, 9)},
        {"mid_block.attn1.processor.to_q_lora.up.weight": (9, 4)}, {f"{LAYER}.dora_scale": (9, 1)},
        {"unet.x.lora_magnitude_vector": (9,), "y": (1,), "z": (1,)}],
    "a LoHa": [{f"{LAYER}.hada_w1_a": (9, 4), f"{LAYER}.hada_w2_b": (4, 9)}],
    "a LoKr": [{f"{LAYER}.lokr_w1": (3, 3), f"{LAYER}.lokr_w2_a": (3, 2)}],
    "an OFT": [{"base_model.to_q.oft_r.default": (4, 3), "base_model.to_k.oft_r.default": (4, 3), "x": (1,)}, {f"{LAYER}.oft_blocks": (4, 2, 2)}, {"base_model.to_q.oft_R.default.weight": (4, 3)}, {f"{LAYER}.oft_diag": (4, 2, 2)}],
    r"an \(IA\)3": [{f"{LAYER}.weight": (9,), f"{LAYER}.on_input": ()}, {"base_model.to_k.ia3_l": (9, 1)}],
    "full differences": [{f"{LAYER}.diff": (9, 9), f"{LAYER}.diff_b": (9,)}, {f"{LAYER}.w_norm": (9,)}],
    "a GLoRA": [{f"{LAYER}.a1.weight": (9, 9), f"{LAYER}.b2.weight": (9, 9)}],
    "a Control-LoRA": [{"lora_controlnet": (0,), "input_blocks.0.0.weight": (9, 4, 3, 3)}],
    "a ControlNet": [{"controlnet_cond_embedding.conv_in.weight": (9, 3, 3, 3)}, {"control_model.zero_convs.0.0.weight": (9, 9, 1, 1)}],
    "a T2I-Adapter": [{"adapter.body.0.resnets.0.block1.weight": (9, 9, 3, 3)},
                      {"conv_in.weight": (9, 64, 3, 3), "body.0.block1.weight": (9, 9, 3, 3), "body.0.block2.bias": (9,)},
                      {"body.0.in_conv.weight": (9, 9, 1, 1), "body.0.body.0.block1.weight": (9, 9), "conv_in.bias": (9,)}],
    "a PhotoMaker": [{"id_encoder.fuse_module.mlp1.fc1.weight": (9, 9), "lora_weights.unet.to_q_lora.up.weight": (9, 4)}],
    "a VeRA": [{"base_model.to_q.vera_lambda_b": (9,), "base_model.vera_A": (4, 9), "base_model.vera_B": (9, 4)}],
    "an adapter of PEFT": [{"base_model.to_q.vblora_logits_A": (4, 9, 9), "x": (1,), "y": (1,)}],
    "a motion module": [{"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (9,)}],
    "a tiny autoencoder": [
        {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "1.conv.0.weight": (64, 64, 3, 3), "1.skip.weight": (64, 64, 1, 1)},
        {"encoder.layers.0.weight": (64, 3, 3, 3), "decoder.layers.1.weight": (64, 4, 3, 3), "decoder.layers.1.bias": (64,)}],
    "an SDXL refiner": [{U + "label_emb.0.0.weight": (9, 2560), keys.TEXT_SGM2 + "token_embedding.weight": (9, 9)}],
    "a Kandinsky model": [{"add_embedding.image_proj.weight": (9, 9), "encoder_hid_proj.image_embeds.weight": (9, 9)},
                          {"input_blocks.0.0.weight": (9, 4, 3, 3), "ln_model_n.weight": (9,), "clip_to_seq.weight": (9, 9)}],
    "x_embedder.proj.weight is missing; the transformer is not whole": [
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 9)}],
    "img_in.weight is missing; the transformer is not whole": [{"double_blocks.0.img_attn.qkv.weight": (9, 9)}],
    "the transformer of a diffusers folder alone": [{"transformer_blocks.0.attn.add_q_proj.weight": (9, 9)}],
    "a transformer model .PixArt": [{"adaln_single.linear.weight": (9, 9)}],
    "a stage of Stable Cascade": [{"clip_txt_mapper.weight": (9, 9)}],
    "a video model": [{U + "input_blocks.1.1.time_stack.0.attn1.to_q.weight": (9, 9)}],
    "an image upscaler": [{"model.1.sub.0.RDB1.conv1.0.weight": (9, 9, 3, 3)}, {"body.0.rdb1.conv1.weight": (9, 9, 3, 3)}],
    "a T5 text tower": [{"encoder.block.0.layer.0.SelfAttention.q.weight": (9, 9), "shared.weight": (9, 9), "x": (1,)}],
    "a CLIP model": [{"vision_model.embeddings.class_embedding": (9,), "text_model.x": (9,), "logit_scale": ()}],
    "an autoencoder alone: give it with --vae": [{"encoder.down_blocks.0.resnets.0.conv1.weight": (9, 9, 3, 3)}],
    "a safety checker": [{"concept_embeds": (17, 768), "special_care_embeds": (3, 768), "x": (1,)}],
}


@pytest.mark.parametrize("kind, shapes", [(k, s) for k, each in NAMES.items() for s in each])
def test_foreign_files_are_named_by_their_tensors(tmp_path, kind, shapes):
    path = tmp_path / "m.safetensors"
    save_file({k: torch.ones(s) for k, s in shapes.items()}, path)
    refuse(path, kind)


def refuse(path, kind):
    with pytest.raises(CheckpointError, match=kind) as error:
        find(path)
    assert str(path) in str(error.value) and len(str(error.value)) - len(str(path)) < 200


EMBEDDING = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 768)}, "name": "cat", "step": 500,
             "sd_checkpoint": "4bdfc29c", "sd_checkpoint_name": "SD1.5"}
HYPERNETWORK = {768: [{"linear.0.weight": torch.ones(9, 9)}] * 2, 320: [{"linear.0.weight": torch.ones(9, 9)}] * 2, "step": 9,
                "name": "anime", "layer_structure": [1, 2, 1], "activation_func": "relu"}
PICKLED = {
    "a textual-inversion embedding": [
        EMBEDDING, {"<cat>": torch.randn(768)},
        EMBEDDING | {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 768))})}],
    "a hypernetwork": [HYPERNETWORK],
    "a PhotoMaker": [{"id_encoder": {"fuse_module.mlp1.fc1.weight": torch.ones(9, 9)},
                      "lora_weights": {"unet.to_q_lora.up.weight": torch.ones(9, 4)}}],
    "an IP-Adapter": [{"image_proj": {"proj.weight": torch.ones(9, 9)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(9, 9)}}],
}


@pytest.mark.parametrize("kind, state", [(k, s) for k, each in PICKLED.items() for s in each])
def test_foreign_pickles_are_named_by_their_structure(tmp_path, kind, state):
    for name in ("m.pt", "m.bin"):
        torch.save(state, tmp_path / name)
        refuse(tmp_path / name, kind)


@pytest.mark.parametrize("name, head, kind", [
    ("m.gguf", b"GGUF\3\0\0\0", "a GGUF file"), ("m.safetensors", b"GGUF\3\0\0\0", "a GGUF file"),
    ("m.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX network"), ("m.engine", b"ftrt", "a TensorRT engine"),
    ("m.trt", bytes(64), "a TensorRT engine"), ("m.h5", b"\x89HDF\r\n\x1a\n", "weights for Keras"),
    ("flax_model.msgpack", b"\x82\xa4unet", "weights for Flax")])
def test_formats_of_other_programs_are_named(tmp_path, name, head, kind):
    (tmp_path / name).write_bytes(head + bytes(100))
    refuse(tmp_path / name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no middle", "other depths"])
def test_distilled_networks_are_named(made, single, tmp_path, how):
    """SSD-1B and its kin lack layers of SDXL: in the middle, or more going down than going up."""
    state, middle = dict(load_file(single)), U + "middle_block.1."
    if how == "no middle":
        state = {k: v for k, v in state.items() if not k.startswith(middle)}
    else:
        block = next(k for k in state if k.startswith(U + "output_blocks.") and ".transformer_blocks.0.norm1.weight" in k)
        block = block.split("transformer_blocks.")[0] + "transformer_blocks."
        state |= {k.replace(block + "0.", block + "9."): v.clone() for k, v in state.items() if k.startswith(block + "0.")}
    save_file(state, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", "a distilled network .SSD-1B, Segmind-Vega")
    assert find(single).family == made[0]
