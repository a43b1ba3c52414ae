"""Tiny random denoisers of diffusers, each with the keyword arguments of a call of two rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, TEXT = 4, 3  # tokens per row
MISSING = None if importlib.util.find_spec("diffusers") else "diffusers is not installed"
ATTENTION = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
DENOISER_SCALE = 0.1  # of random adapters: larger ones outweigh the -10000 by which diffusers masks text
QWEN_IMAGE = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


def denoiser(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """What makes the class `name` of diffusers; imported then, because few have it installed."""

    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**fields).eval()

    return build


def text(dim: int, mask: str = "", **given: Tensor) -> dict[str, Any]:
    masks = {mask: torch.ones(2, TEXT, dtype=torch.long)} if mask else {}
    return {"encoder_hidden_states": torch.randn(2, TEXT, dim), "timestep": torch.tensor([1.0, 5.0])} | masks | given


def positions() -> dict[str, Tensor]:
    return {"img_ids": torch.randn(IMAGE, 3), "txt_ids": torch.randn(TEXT, 3)}


DENOISERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "Flux": (
        denoiser(
            "FluxTransformer2DModel",
            **ATTENTION,
            in_channels=4,
            num_single_layers=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        lambda: text(32, hidden_states=torch.randn(2, IMAGE, 4), pooled_projections=torch.randn(2, 32)) | positions(),
    ),
    "Stable Diffusion 3": (
        denoiser(
            "SD3Transformer2DModel",
            **ATTENTION,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        ),
        lambda: text(32, hidden_states=torch.randn(2, 4, 4, 4), pooled_projections=torch.randn(2, 32)),
    ),
    "Qwen-Image": (
        denoiser(
            "QwenImageTransformer2DModel",
            **ATTENTION,
            in_channels=16,
            out_channels=4,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        lambda: (
            text(16, "encoder_hidden_states_mask", hidden_states=torch.randn(2, IMAGE, 16))
            | {"img_shapes": [[(1, 2, 2)]] * 2}
        ),
    ),
    "PixArt": (
        denoiser(
            "PixArtTransformer2DModel",
            **ATTENTION,
            sample_size=8,
            caption_channels=32,
            cross_attention_dim=32,
            use_additional_conditions=False,
        ),
        lambda: (
            text(32, "encoder_attention_mask", hidden_states=torch.randn(2, 4, 8, 8))
            | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
    ),
    "DiT": (
        denoiser("DiTTransformer2DModel", **ATTENTION, sample_size=8, in_channels=4, num_embeds_ada_norm=8),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([1, 5]),
            "class_labels": torch.tensor([1, 5]),
        },
    ),
    "Sana": (
        denoiser(
            "SanaTransformer2DModel",
            **ATTENTION,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=8,
            sample_size=4,
        ),
        lambda: text(8, "encoder_attention_mask", hidden_states=torch.randn(2, 4, 4, 4)),
    ),
    "Wan": (
        denoiser(
            "WanTransformer3DModel", **ATTENTION, in_channels=4, out_channels=4, text_dim=16, ffn_dim=32, freq_dim=64
        ),
        lambda: text(16, hidden_states=torch.randn(2, 4, 2, 4, 4)),
    ),
    "LTX-Video": (
        denoiser(
            "LTXVideoTransformer3DModel",
            **ATTENTION,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        lambda: (
            text(32, "encoder_attention_mask", hidden_states=torch.randn(2, 8, 4))
            | {"num_frames": 2, "height": 2, "width": 2}
        ),
    ),
    "HunyuanVideo": (
        denoiser(
            "HunyuanVideoTransformer3DModel",
            **ATTENTION,
            in_channels=4,
            out_channels=4,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size_t=1,
            guidance_embeds=False,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda: text(
            16,
            "encoder_attention_mask",
            hidden_states=torch.randn(2, 4, 1, 4, 4),
            pooled_projections=torch.randn(2, 8),
        ),
    ),
    "Mochi": (
        denoiser(
            "MochiTransformer3DModel",
            **ATTENTION,
            pooled_projection_dim=32,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
        lambda: text(16, "encoder_attention_mask", hidden_states=torch.randn(2, 12, 2, 4, 4)),
    ),
}
PADDED = ("Qwen-Image", "PixArt", "Sana", "LTX-Video")  # all of their modules see the image or the text


def row(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One row of a call."""

    def of(name: str, value: Any) -> Any:
        is_batch = isinstance(value, (Tensor, list)) and name not in ("img_ids", "txt_ids")
        return value[index : index + 1] if is_batch else value

    return {name: of(name, value) for name, value in inputs.items()}


def shortened(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """A call with the first `length` tokens of its text."""
    names = ("encoder_hidden_states", *MASKS)
    return inputs | {name: inputs[name][:, :length] for name in names if name in inputs}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    floats = {k: v.double() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return inputs | floats
