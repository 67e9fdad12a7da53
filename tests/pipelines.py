"""Tiny pipelines of diffusers with random weights, saved in a folder."""

from pathlib import Path

import pytest
import torch

from evodiff.compat import import_torchvision


def scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


def unconditional(folder: Path) -> Path:
    """A folder like that of LSUN-Bedroom: an unconditional U-Net and a VQ decoder."""
    import_torchvision()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **blocks,
    )
    decoder = diffusers.VQModel(
        latent_channels=3,
        num_vq_embeddings=16,
        vq_embed_dim=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **blocks,
    )
    diffusers.LDMPipeline(vqvae=decoder, unet=unet, scheduler=scheduler()).save_pretrained(folder / "ldm")
    return folder / "ldm"


def text_conditional(folder: Path) -> Path:
    """A folder like that of Stable Diffusion: a text-conditional U-Net, a KL decoder, a text encoder and its tokens."""
    import_torchvision()
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "dog</w>", "a", "c", "t", "d", "o", "g"]
    (folder / "vocab.json").write_text(str({w: i for i, w in enumerate(vocabulary)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=8
    )
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    decoder = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.18215,
    )
    pipe = diffusers.StableDiffusionPipeline(
        decoder, encoder, tokenizer, unet, scheduler(), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder
