"""Small checkpoints in the layouts of the published ones."""

import gzip
from collections import OrderedDict
from pathlib import Path

import torch

from evodiff.models.networks import build

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"

ADM = {
    **{"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1},
    **{"attention_resolutions": [2], "channel_mult": [1, 1], "num_classes": 4, "num_head_channels": 16},
    **{"use_scale_shift_norm": True, "resblock_updown": True},
}
CLASSIFIER = {key: value for key, value in ADM.items() if key != "num_classes"} | {
    "out_channels": 4,
    "pool": "attention",
}
DDIM = {
    "model": {
        **{"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4]},
        **{"dropout": 0.1, "resamp_with_conv": True},
    },
    "data": {"image_size": 8, "channels": 3},
    "diffusion": {"beta_start": 1e-4, "beta_end": 0.03, "num_diffusion_timesteps": 500},
}
SCORE_SDE = {
    "model": {
        **{"name": "ncsnpp", "nf": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.1},
        **{
            "resamp_with_conv": True,
            "conditional": True,
            "fir": True,
            "fir_kernel": [1, 3, 3, 1],
            "skip_rescale": True,
        },
        **{"resblock_type": "biggan", "progressive": "none", "progressive_input": "residual", "scale_by_sigma": True},
        **{"progressive_combine": "sum", "embedding_type": "fourier", "fourier_scale": 16, "init_scale": 0.0},
        **{"sigma_min": 0.01, "sigma_max": 50, "num_scales": 10},
    },
    "data": {"image_size": 8, "num_channels": 3, "centered": False},
    "training": {"sde": "vesde"},
}


def official_edm_pickle(folder):
    """Written by the classes of NVlabs/edm, each weight one constant; its embedded source must not be executed."""
    path = folder / "baseline.pkl"
    path.write_bytes(gzip.decompress((GOLDEN / "edm_vp_constant.pkl.gz").read_bytes()))
    return path


def weights(architecture, config, shift=0.0):
    torch.manual_seed(0)
    return OrderedDict((k, v + shift) for k, v in build(architecture, config).state_dict().items())


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def saved(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path
