"""A diffusion model of diffusers as one `nn.Module`: the only place where kinds of diffusion models differ.

`Denoiser` holds the networks of a pipeline (denoising network, text encoder, autoencoder) under their pipeline names, so that its
state-dict keys are theirs, and knows four kinds of prediction. With x_t = a_t x + b_t e (flow matching: a = 1 - s, b = s,
s = t / T) and the network's output o at (x_t, t):

    epsilon        x = (x_t - b o) / a       e = o
    sample         x = o                     e = (x_t - a o) / b
    v_prediction   x = a x_t - b o           e = b x_t + a o
    flow           x = x_t - b o             e = x_t + a o

All are affine images of each other at fixed (x_t, t): a recipe whose target is an affine combination of predictions with
weights summing to one (ESD, SalUn, CA) is the same recipe for every kind, up to a weight in t.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadModel, UnmetNeed
from expunge.tasks.conditions import ClassConditions, Conditions, TextConditions

NETWORKS = ("unet", "transformer")
RESTING = ("text_encoder", "vae")
"""Networks that stay as they are unless a scope names them: a request is about what the denoising network draws."""
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")
SUPPORTED = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "Transformer2DModel")


class Denoiser(nn.Module):
    """The networks of a diffusers pipeline.

    Args:
        pipeline: a live pipeline with a UNet2DModel, UNet2DConditionModel or DiT, class- or text-conditional.
        null: the class id that means "no class"; "last": the last class embedding; None: the model has none. Ignored with text.

    `pipeline()` gives back a pipeline of the same class with the networks as they are now; `save_pretrained(folder)` writes one.
    """

    def __init__(self, pipeline: Any, null: int | str | None = "last"):
        super().__init__()
        parts = dict(pipeline.components)
        names = [name for name in NETWORKS if isinstance(parts.get(name), nn.Module)]
        if len(names) != 1 or type(parts[names[0]]).__name__ not in SUPPORTED:
            found = ", ".join(f"{k} ({type(v).__name__})" for k, v in parts.items() if v is not None)
            raise BadModel(
                f"expected a pipeline with one denoising network, one of {', '.join(SUPPORTED)}, found {found}; pipelines with "
                "several encoders or other transformers are not served"
            )
        self.network_name = names[0]
        if getattr(parts.get("text_encoder_2"), "config", None) is not None:
            raise BadModel(
                "expected a pipeline with one text encoder, found text_encoder_2 as well; such pipelines are not served"
            )
        self.pipeline_class = type(pipeline)
        self.others: dict[str, Any] = {}
        for name, part in parts.items():
            if isinstance(part, nn.Module) and name in (*NETWORKS, *RESTING):
                self.add_module(name, part)
            elif name != "scheduler":
                self.others[name] = part
        self.scheduler = parts["scheduler"]
        for name in RESTING:
            if name in self._modules:
                self._modules[name].requires_grad_(False)  # type: ignore[union-attr]
        self.null_given = null
        self.arguments = {k: v for k, v in getattr(pipeline, "config", {}).items() if k == "requires_safety_checker"}
        self.prediction_type  # noqa: B018 (an unknown one is refused at once)
        self.conditions  # noqa: B018

    # -- what it is made of ----------------------------------------------------------------------------------------
    @property
    def network(self) -> Any:
        """The denoising network."""
        return self._modules[self.network_name]

    @property
    def kind(self) -> str:
        """`text` or `class`."""
        return "text" if self._modules.get("text_encoder") is not None else "class"

    @property
    def tokenizer(self) -> Any:
        return self.others.get("tokenizer")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def flow(self) -> bool:
        return "FlowMatch" in type(self.scheduler).__name__

    @property
    def prediction_type(self) -> str:
        """One of `PREDICTIONS`, as the scheduler says it."""
        if self.flow:
            return "flow"
        found = getattr(self.scheduler.config, "prediction_type", None)
        if found not in PREDICTIONS[:3]:
            raise BadModel(
                f"expected a scheduler whose prediction_type is one of {', '.join(PREDICTIONS[:3])} (or a flow-matching one), "
                f"found {found!r} in {type(self.scheduler).__name__}; set it in scheduler/scheduler_config.json"
            )
        return str(found)

    @property
    def conditions(self) -> Conditions:
        """How conditions are written and replaced."""
        if self.kind == "text":
            if self.tokenizer is None:
                raise BadModel("expected a tokenizer beside the text encoder, found none; save the whole pipeline")
            encoder: Any = self._modules["text_encoder"]
            most = encoder.config.max_position_embeddings
            return TextConditions(self.tokenizer, min(int(self.tokenizer.model_max_length), int(most)))
        config = self.network.config
        embeddings = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if not embeddings:
            raise BadModel(
                "expected a class- or text-conditional model, found one without class embeddings and without a text encoder; "
                "for unconditional generators use the task 'gan' or condition the model"
            )
        if self.network_name == "transformer":  # a DiT's table has one more row than it says, for the null class
            return ClassConditions(int(embeddings), int(embeddings) if self.null_given is not None else None)
        null = int(embeddings) - 1 if self.null_given == "last" else self.null_given
        return ClassConditions(int(embeddings) - (null is not None), None if null is None else int(null))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        config = self.network.config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)

    @property
    def horizon(self) -> int:
        """T: how many timesteps there are in training."""
        return int(self.scheduler.config.num_train_timesteps)

    # -- noise -----------------------------------------------------------------------------------------------------
    def levels(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t of x_t = a_t x + b_t e, each (B, 1, 1, 1) float32 on the device of `like` (B, ...)."""
        at = timestep.to(like.device).reshape(-1, *[1] * (like.dim() - 1)).expand(len(like), *[1] * (like.dim() - 1))
        if self.flow:
            share = at.float() / self.horizon
            return 1 - share, share
        kept = self.scheduler.alphas_cumprod.to(like.device).float()[at.long()]
        return kept.sqrt(), (1 - kept).sqrt()

    def timesteps(self, count: int, rng: torch.Generator) -> Tensor:
        """(count,) int64 training timesteps drawn uniformly: 0..T-1, for flow matching 1..T."""
        return torch.randint(0, self.horizon, (count,), generator=rng) + int(self.flow)

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t, (B, C, H, W)."""
        a, b = self.levels(timestep, clean)
        return a * clean + b * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is trained to say at x_t."""
        kind = self.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        if kind == "flow":
            return noise - clean
        a, b = self.levels(timestep, clean)
        return a * noise - b * clean

    def to_clean(self, noisy: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The clean latents x that an output stands for, in float32."""
        a, b = self.levels(timestep, noisy)
        noisy, output = noisy.float(), output.float()
        kind = self.prediction_type
        if kind == "epsilon":
            return (noisy - b * output) / a
        if kind == "sample":
            return output
        return a * noisy - b * output if kind == "v_prediction" else noisy - b * output

    def to_noise(self, noisy: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The noise e that an output stands for, in float32."""
        a, b = self.levels(timestep, noisy)
        noisy, output = noisy.float(), output.float()
        kind = self.prediction_type
        if kind == "epsilon":
            return output
        if kind == "sample":
            return (noisy - a * output) / b
        return b * noisy + a * output if kind == "v_prediction" else noisy + a * output

    def from_noise(self, noisy: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The output that stands for a noise: what `to_noise` undoes."""
        a, b = self.levels(timestep, noisy)
        kind = self.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return (noisy - b * noise) / a
        return (noise - (noisy if kind == "flow" else b * noisy)) / a

    # -- networks --------------------------------------------------------------------------------------------------
    def encode(self, condition: Tensor, prefix: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """What the network is told: class ids (B,), or the text encoder's last hidden states (B, L, d).

        prefix: (k, d) or (B, k, d) word embeddings put between the start token and the prompt; as many of the last positions
            (padding) fall away. words: (B, L, d) word embeddings instead of the prompt's own. Text only.
        """
        if self.kind == "class":
            return condition.to(self.device)
        encoder: Any = self._modules["text_encoder"]
        ids = condition.to(self.device)
        mask = {}
        if getattr(encoder.config, "use_attention_mask", False):
            mask["attention_mask"] = (ids != self.tokenizer.pad_token_id).long()
        with embedding_override(encoder, prefix, words):
            return encoder(ids, **mask)[0]

    def forward(self, noisy: Tensor, timestep: Tensor, encoded: Tensor) -> Tensor:
        """The network's output (B, C, H, W) at x_t (B, C, H, W), t (B,) or (), and an encoded condition."""
        given = noisy.to(self.dtype)
        if self.kind == "text":
            return self.network(given, timestep, encoder_hidden_states=encoded.to(self.dtype)).sample
        if self.network_name == "unet":
            return self.network(given, timestep, class_labels=encoded).sample
        at = timestep.expand(len(noisy)) if timestep.dim() == 0 else timestep
        return self.network(given, timestep=at, class_labels=encoded).sample[:, : noisy.shape[1]]

    def guided(
        self,
        noisy: Tensor,
        timestep: Tensor,
        encoded: Tensor,
        null: Tensor | None,
        scale: float,
        memory: dict[str, Any],
    ) -> Tensor:
        """Classifier-free guidance in diffusers' convention, o_0 + scale (o_c - o_0), both halves in one batch.

        memory: kept over the steps of one sampling, for guards: `step` (the index of this one), `total`, `trajectory`."""
        if null is None or scale == 1.0:
            return self(noisy, timestep, encoded)
        both = self(torch.cat([noisy, noisy]), timestep if timestep.dim() == 0 else timestep.repeat(2),
                    torch.cat([null, encoded]))  # fmt: skip
        without, with_ = both.chunk(2)
        return without + scale * (with_ - without)

    # -- pictures --------------------------------------------------------------------------------------------------
    def latents(self, images: Tensor) -> Tensor:
        """What the network denoises, of images (B, C, H, W) in [-1, 1]: the autoencoder's mean, scaled; or the images."""
        vae: Any = self._modules.get("vae")
        if vae is None:
            return images
        found = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((found - _shift(vae)) * vae.config.scaling_factor).float()

    def images(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of clean latents, clamped once at the end."""
        vae: Any = self._modules.get("vae")
        if vae is None:
            return latents.float().clamp(-1, 1)
        found = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + _shift(vae)).sample
        return found.float().clamp(-1, 1)

    # -- in and out ------------------------------------------------------------------------------------------------
    def pipeline(self) -> Any:
        """A pipeline of the class it came from, on these very networks (not copied)."""
        return self.pipeline_class(
            **{k: v for k, v in self._modules.items() if v is not None}, **self.others, scheduler=self.scheduler,
            **self.arguments,
        )  # fmt: skip

    def save_pretrained(self, folder: Any, **_: Any) -> None:
        """An ordinary pipeline folder, as safetensors."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)

    @property
    def config(self) -> Any:
        return self.network.config

    def fresh_copy(self) -> Denoiser:
        """A copy whose denoising network starts anew from its config; text encoder and autoencoder stay, as they do when
        such a model is trained."""
        other = copy.deepcopy(self)
        other._modules[self.network_name] = type(self.network).from_config(self.network.config)
        return other


def _shift(vae: Any) -> float:
    return float(getattr(vae.config, "shift_factor", None) or 0.0)


@contextmanager
def embedding_override(encoder: Any, prefix: Tensor | None, words: Tensor | None) -> Iterator[None]:
    """Within it the encoder's word embeddings are others. A hook, because transformers 5 has no `inputs_embeds` here."""
    if prefix is None and words is None:
        yield
        return

    def replace(_module: nn.Module, _inputs: Any, own: Tensor) -> Tensor:
        found = own if words is None else words.to(own)
        if prefix is None:
            return found
        put = prefix.to(found).expand(len(found), -1, -1)
        rest = found.shape[1] - 1 - put.shape[1]
        if rest < 1:
            raise UnmetNeed(
                f"expected room for {put.shape[1]} more tokens in prompts of {found.shape[1]}, found none; use a shorter prefix"
            )
        return torch.cat([found[:, :1], put, found[:, 1 : 1 + rest]], 1)

    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
