"""Latent diffusion models through the optional package diffusers (arXiv 2112.10752): sampled as latents, decoded after.

A text-conditional model takes its prompts from a file, one a line; an image's label is the number of its line.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evodiff.checkpoints.registry import offline
from evodiff.compat import import_torchvision
from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.files import sha256
from evodiff.models.adapter import DiscreteTime, NetworkDenoiser, process
from evodiff.models.loading import nearly_0
from evodiff.models.pretrained import Pretrained
from evodiff.paths import resolve
from evodiff.schedule import DiscreteVP

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names, and ours."""


def latent(
    pipeline: str,
    prompts: str | None = None,
    schedule: str = "own",
    scaling: float | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A folder or a hub name that diffusers reads: its U-Net, decoder, betas and, with `prompts`, its text encoder.

    `scaling` is what latents were multiplied with in training; None: the `scaling_factor` that diffusers gives the
    decoder, 0.18215 where its configuration has none. Relative paths may start at the project's root. Under
    EVODIFF_OFFLINE a hub name means what the hub's cache on this machine holds of it. Raises ConfigError if diffusers
    is not installed or the pipeline cannot be read.
    """
    if offline():
        # before the import: huggingface_hub fetches a list of programs that use it, also when all files are local
        os.environ["HF_HUB_OFFLINE"] = "1"
    import_torchvision()  # diffusers' models import it, and beside a CPU build of torch it fails without this
    try:
        from diffusers import DiffusionPipeline
    except ImportError as e:
        raise ConfigError("latent models need the package diffusers. Install it: pip install -e '.[diffusers]'.") from e
    folder = resolve(pipeline)
    source = str(folder if folder.exists() else pipeline)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, safety_checker=None, local_files_only=offline())
    except (OSError, ValueError, ImportError, TypeError) as e:
        if offline() and not folder.exists():
            raise ConfigError(
                f"model.pipeline={pipeline} is not here and EVODIFF_OFFLINE is set. On a machine with internet run "
                f"`hf download {pipeline} --local-dir FOLDER`, copy FOLDER here, and set model.pipeline to it."
            ) from e
        raise ConfigError(
            f"model.pipeline={pipeline} cannot be read by diffusers ({' '.join(str(e).split())[:200]}). "
            f"Give a folder with model_index.json, or a name on the hub."
        ) from e
    parts = pipe.components
    decoder = parts.get("vae") or parts.get("vqvae")
    if decoder is None or parts.get("unet") is None:
        raise ConfigError(
            f"model.pipeline={pipeline} has {', '.join(sorted(parts))}; a latent model needs unet, and vae or vqvae."
        )
    texts = read_prompts(prompts) if prompts is not None else None
    conditional = parts.get("text_encoder") is not None
    if conditional != (texts is not None):
        raise ConfigError(
            f"model.pipeline={pipeline} is {'conditioned on text: give' if conditional else 'unconditional: remove'} "
            f"model.prompts, a file with one prompt per line."
        )
    embeddings = embed_prompts(parts["tokenizer"], parts["text_encoder"].to(device), texts) if texts else None
    model = from_parts(parts["unet"], decoder, parts["scheduler"], embeddings, schedule, scaling, device)
    files = _files(folder) | ({Path(prompts).name: sha256(resolve(prompts))} if prompts is not None else {})
    return dataclasses.replace(model, files=files)


def from_parts(
    unet: Any,
    decoder: Any,
    scheduler: Any,
    embeddings: Tensor | None = None,
    schedule: str = "own",
    scaling: float | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A model of diffusers' parts, as `latent` makes it; `embeddings` [K + 1, tokens, width] are those of K prompts
    and, last, of none."""
    _check_parts(unet, scheduler)
    unet, decoder = (part.eval().requires_grad_(False).to(device) for part in (unet, decoder))
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    *alphas, last = scheduler.alphas_cumprod.double().sqrt().tolist()
    native = DiscreteVP(tuple(math.log(a) for a in (*alphas, last or nearly_0(alphas[-1]))))
    seen = process(native, DiscreteTime(len(native.log_alphas)), schedule)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ConfigError(f"prediction_type={kind} of this pipeline is not known; possible: {', '.join(PREDICTIONS)}.")
    if embeddings is not None:
        embeddings = embeddings.to(device, unet.dtype)
    scaling = decoder.config.get("scaling_factor", 1.0) if scaling is None else scaling

    def denoiser(labels: Tensor | None) -> Denoiser:
        def network(x: Tensor, t: Tensor) -> Tensor:
            if embeddings is None:
                return unet(x.to(unet.dtype), t).sample.float()
            rows = embeddings[-1:].expand(len(x), -1, -1) if labels is None else embeddings[labels]
            return unet(x.to(unet.dtype), t, encoder_hidden_states=rows).sample.float()

        return NetworkDenoiser(network, PREDICTIONS[kind], seen)

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        # one at a time: at 512 x 512 the decoder, not the U-Net, would decide how much memory a batch takes
        return torch.cat([decoder.decode((part / scaling).to(decoder.dtype)).sample.float() for part in z.split(1)])

    return Pretrained(
        denoiser,
        shape=(unet.config.in_channels, height, width),
        num_classes=0 if embeddings is None else len(embeddings) - 1,
        decode=decode,
        device=torch.device(device),
        networks=(unet,),
    )


def _check_parts(unet: Any, scheduler: Any) -> None:
    """Raise ConfigError for a pipeline that needs more than a latent, a time and a text."""
    of_unet, channels = unet.config, unet.config.in_channels
    asks = [key for key in ("addition_embed_type", "class_embed_type", "num_class_embeds") if of_unet.get(key)]
    if asks or of_unet.out_channels not in (channels, 2 * channels):
        why = f"{asks[0]}={of_unet.get(asks[0])}" if asks else f"{channels} channels in and {of_unet.out_channels} out"
        raise ConfigError(
            f"this pipeline's U-Net has {why}: it needs more than a latent, a time and a text, as those of SDXL and of "
            f"inpainting do. Possible: pipelines like Stable Diffusion 1 and 2; for others give the pipeline a "
            f"scheduler of evodiff.interop.diffusers."
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(
            f"this pipeline's scheduler, {type(scheduler).__name__}, has no betas: its noise schedule is not known "
            f"here. Possible: pipelines like Stable Diffusion 1 and 2; for others see evodiff.interop.diffusers."
        )


@torch.no_grad()
def embed_prompts(tokenizer: Any, encoder: Any, prompts: list[str]) -> Tensor:
    """[K + 1, tokens, width]: the prompts and, last, the empty one of classifier-free guidance."""
    rows = []
    for text in (*prompts, ""):
        tokens = tokenizer(
            text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        rows.append(encoder(tokens.input_ids.to(encoder.device))[0])
    return torch.cat(rows)


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty; a relative path may start at the project's root. Raises ConfigError."""
    try:
        prompts = [line.strip() for line in resolve(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"model.prompts={path} cannot be read ({e}). Give a text file with one prompt per line."
        ) from e
    if not prompts:
        raise ConfigError(f"model.prompts={path} holds no prompt. Give a text file with one prompt per line.")
    return prompts


def _files(folder: Path) -> dict[str, str]:
    """sha256 of the weight files of a local pipeline; of one from the hub, none: its cache decides where they are."""
    weights = [path for kind in ("safetensors", "bin") for path in sorted(folder.rglob(f"*.{kind}"))]
    return {str(path.relative_to(folder)): sha256(path) for path in weights}
