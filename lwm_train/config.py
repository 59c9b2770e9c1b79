"""The manifests of training and evaluation, and the model presets.

train        one stage: a model, datasets with shares, a mesh, an optimizer
curriculum   train manifests in turn, each starting from the one before
eval         what to measure of a run: held-out loss, n-gram baselines, needle retrieval, samples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lwm_data.format.manifest import ManifestModel, ManifestPath, read_manifest
from lwm_data.format.vocab import VISION_VOCAB_SIZE

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a LLaMA with text and vision embeddings and heads (the LWM release's `lwm/vision_llama.py`)."""

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    text_vocab_size: int
    vision_vocab_size: int = VISION_VOCAB_SIZE
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations; parameters are float32 (float64 where this is)
    tie_heads: bool = False  # each head is its modality's embedding table, transposed
    remat: str = "block"  # which activations of a layer are kept for the backward pass: remat.py
    mlp_chunk: int = 8192  # tokens of a row on a device whose MLP is computed at a time: mlp.py
    attention_schedule: str = "auto"  # who meets whom over sp, and what computes a meeting: attention/dispatch.py
    attention_kernel: str = "auto"

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


# dim, ffn_dim, layers, heads, kv heads. 1b to 13b as in the release's lwm/llama.py, 7b and 13b are LLaMA-2's; with
# grouped heads: 1b-gqa is TinyLlama's shape, 8b that of LLaMA-3 and Mistral, 70b that of LLaMA-2 70B.
PRESETS: Mapping[str, tuple[int, int, int, int, int]] = {
    "tiny": (32, 64, 2, 4, 2),
    "demo": (128, 384, 3, 4, 4),
    "1b": (2048, 5504, 22, 16, 16),
    "3b": (3200, 8640, 26, 32, 32),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "1b-gqa": (2048, 5632, 22, 32, 4),
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}


class AttentionSpec(ManifestModel):
    """How attention is computed; it changes no result but its rounding."""

    schedule: Literal["auto", "ring", "allgather", "ulysses"] = Field(
        default="auto", description="who meets whom over sp"
    )
    kernel: Literal["auto", "xla", "splash"] = Field(
        default="auto", description="what computes a meeting; auto is splash on TPU, xla elsewhere"
    )


class ModelSpec(ManifestModel):
    """A preset, and what the stage changes of it."""

    preset: Literal["tiny", "demo", "1b", "3b", "7b", "13b", "1b-gqa", "8b", "70b"]
    rope_theta: float = Field(default=1e4, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0, description="of the norms; LLaMA-2's own weights want 1e-5")
    tie_heads: bool = Field(default=False, description="each head is its embedding table, transposed")

    def config(
        self,
        text_vocab_size: int,
        dtype: str = "float32",
        remat: str = "block",
        mlp_chunk: int = 8192,
        attention: AttentionSpec | None = None,
    ) -> ModelConfig:
        attention = attention or AttentionSpec()
        return ModelConfig(
            *PRESETS[self.preset],
            text_vocab_size,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            dtype=dtype,
            tie_heads=self.tie_heads,
            remat=remat,
            mlp_chunk=mlp_chunk,
            attention_schedule=attention.schedule,
            attention_kernel=attention.kernel,
        )


class DataSpec(ManifestModel):
    dataset: ManifestPath = Field(description="folder of a dataset built by lwm-data")
    share: float = Field(default=1.0, gt=0, description="share of each batch's rows, relative to the others")


class MeshSpec(ManifestModel):
    """Devices along each axis; one may be -1, all that are left."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    sp: int = 1

    @model_validator(mode="after")
    def _check(self) -> MeshSpec:
        sizes = [self.dp, self.fsdp, self.tp, self.sp]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"axes of 1 or more devices, at most one of them -1; got {sizes}")
        return self


class OptimizerSpec(ManifestModel):
    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon moves the layers' matrices, adamw the rest"
    )
    lr: float = Field(default=3e-4, gt=0)
    adam_lr: float | None = Field(default=None, gt=0, description="muon: lr of embeddings, heads and norms")
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = Field(default=0, ge=0, description="steps from 0 to lr")
    final_lr: float = Field(default=0.1, ge=0, description="at the last step, as a share of lr")
    weight_decay: float = Field(default=0.1, ge=0)
    decay: Literal["matrices", "all"] = Field(
        default="matrices", description="what decays: all but the norms, or all, as in the release"
    )
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    moments: Literal["fp32", "bf16"] = Field(
        default="fp32", description="how the first moment is stored; the second is float32"
    )
    skip_nonfinite: Positive | None = Field(
        default=None,
        description="pass over a step whose gradient is not finite, and stop after so many in a row; "
        "by default the first ends the run",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSpec:
        if (self.name == "muon") != (self.adam_lr is not None):
            raise ValueError("adam_lr with name: muon, and only there")
        return self


class Shares(ManifestModel):
    """Weight of each modality's mean loss, as the release's 0.5 and 0.5."""

    text: float = Field(ge=0)
    vision: float = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Shares:
        if self.text + self.vision == 0:
            raise ValueError("text or vision above 0; with both 0 nothing is trained")
        return self


class LossSpec(ManifestModel):
    weighting: Literal["dataset"] = "dataset"
    shares: Shares | None = None
    z_loss: float = Field(
        default=0.0, ge=0, description="weight of log(sum(exp(logits)))^2, added to each token's cross-entropy"
    )


class CheckpointSpec(ManifestModel):
    every: Positive = 100
    keep: Positive = Field(default=3, description="newest ones")
    keep_every: Positive | None = Field(default=None, description="besides, those of steps that this divides, for good")


class EvaluateSpec(ManifestModel):
    """Held-out loss while a run trains."""

    every: Positive = Field(description="steps")
    dataset: ManifestPath = Field(description="a dataset that training never saw")
    rows: Positive = Field(default=64, description="its first ones")


class InitFromRun(ManifestModel):
    run: ManifestPath = Field(description="folder of a finished run whose parameters this one starts from")


class TrainManifest(ManifestModel):
    kind: Literal["train"]
    name: str
    out: ManifestPath
    seed: Seed = 0
    init: Literal["random"] | InitFromRun = "random"
    model: ModelSpec
    precision: Literal["fp32", "bf16"] = "bf16"
    remat: Literal["none", "block", "save-attention", "offload"] = Field(
        default="block",
        description="none keeps all activations, block none of them, save-attention the attention's results, "
        "offload these and each layer's input in the host's memory",
    )
    mlp_chunk: Positive = Field(default=8192, description="tokens of a row on a device whose MLP exists at a time")
    data: tuple[DataSpec, ...] = Field(min_length=1)
    batch_rows: Positive
    accumulate: Positive = Field(default=1, description="parts of a batch, one after the other; same gradient")
    steps: Positive
    mesh: MeshSpec = MeshSpec()
    attention: AttentionSpec = AttentionSpec()
    order: Literal["contiguous", "zigzag", "striped", "dealt", "auto"] = Field(
        default="auto", description="order of a row's tokens over the ring"
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    loss: LossSpec = LossSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec | None = None
    watchdog: float = Field(
        default=600.0, ge=0, description="seconds without a finished step after which the run ends itself; 0: never"
    )


class CurriculumManifest(ManifestModel):
    kind: Literal["curriculum"]
    name: str
    stages: tuple[ManifestPath, ...] = Field(min_length=1, description="train manifests, in order")


class NeedleSpec(ManifestModel):
    haystack: ManifestPath = Field(description="glob of texts that no training example was made of")
    lengths: tuple[Positive, ...] = Field(min_length=1, description="tokens of the whole prompt")
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0, 0.25, 0.5, 0.75, 1), min_length=1)
    rounds: Positive = Field(default=4, description="prompts per length and depth")
    seed: Seed = 0


class SampleSpec(ManifestModel):
    prompts: tuple[str, ...] = Field(min_length=1)
    num_tokens: Positive = 100
    temperature: float = Field(default=0.8, ge=0)
    seed: Seed = 0


class EvalManifest(ManifestModel):
    kind: Literal["eval"]
    name: str
    run: ManifestPath = Field(description="folder of the run to evaluate")
    mesh: MeshSpec | None = Field(default=None, description="the run's own by default")
    heldout: ManifestPath | None = Field(default=None, description="a dataset that training never saw")
    ngram_baselines: ManifestPath | None = Field(
        default=None, description="dataset to fit a unigram and a bigram model on, for comparison on `heldout`"
    )
    needle: NeedleSpec | None = None
    samples: SampleSpec | None = None


KINDS: Mapping[str, type[ManifestModel]] = {
    "train": TrainManifest,
    "curriculum": CurriculumManifest,
    "eval": EvalManifest,
}


def read_eval_manifest(path: str | Path, overrides: Sequence[str] = ()) -> EvalManifest:
    """The eval manifest at `path`."""
    manifest = read_manifest(path, {"eval": EvalManifest}, overrides)
    assert isinstance(manifest, EvalManifest)
    return manifest


def read_train_manifests(path: str | Path, overrides: Sequence[str] = ()) -> list[TrainManifest]:
    """The stages that `path` names: one of a train manifest, several of a curriculum.

    A stage of a curriculum starts from the one before it, whatever its own `init` says of a random start.
    """
    manifest = read_manifest(path, {"train": TrainManifest, "curriculum": CurriculumManifest}, overrides)
    if isinstance(manifest, TrainManifest):
        return [manifest]
    assert isinstance(manifest, CurriculumManifest)
    stages: list[TrainManifest] = []
    for stage_path in manifest.stages:
        stage = read_manifest(stage_path, {"train": TrainManifest})
        assert isinstance(stage, TrainManifest)
        if stages and stage.init == "random":
            stage = stage.model_copy(update={"init": InitFromRun(run=stages[-1].out)})
        stages.append(stage)
    return stages
