"""Frozen configuration, checked once at the border."""

from __future__ import annotations

from dataclasses import dataclass

from neuqi_serve.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)
SUPPORTED_GROUP_SIZES = (32, 64, 128, -1)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
WHOLE_ROW = -1
# Grows with every change after which the same weights give other codes, scales or zero-points: cached weights made
# with another number are not used.
ALGORITHM_VERSION = 1
# How thorough the search is: near the paper's at a fraction of its cost; faster still; the paper's; the baseline.
PRESETS = ("balanced", "fast", "reference", "minmax")
DEFAULT_PRESET = PRESETS[0]


@dataclass(frozen=True)
class WeightSpec:
    """How one weight matrix ``[N, K]`` is stored: ``w ≈ (q − zero)·scale``.

    ``bits`` b: codes ``q`` are integers ``0 … 2^b − 1``. ``group_size`` g: input features that share one scale
    and zero-point; −1 is the whole row. ``scale_dtype``: storage of ``scale`` and ``zero``.

    Raises:
        UsageError: a value outside the supported set.
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(f"bits must be one of {SUPPORTED_BITS}, got {self.bits!r}. Try 4 (or 3, or 2).")
        if self.group_size not in SUPPORTED_GROUP_SIZES:
            raise UsageError(
                f"group size must be one of {SUPPORTED_GROUP_SIZES} (-1 is the whole row), got {self.group_size!r}. "
                "Try 128."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype!r}.")

    def groups(self, in_features: int) -> int:
        """Number of groups G in a row of ``in_features`` weights.

        Raises:
            UsageError: the group size does not divide the row, or the row is no multiple of 32.
        """
        if in_features % 32:
            raise UsageError(
                f"rows must be a multiple of 32 weights long, got {in_features}. Leave this layer unquantized."
            )
        if self.group_size == WHOLE_ROW:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (128, 64, 32) if in_features % g == 0]
            raise UsageError(
                f"group size {self.group_size} does not divide the row of {in_features} weights. "
                f"Sizes that do: {fits} or -1 (whole row)."
            )
        return in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a row, scale and zero-point included (e.g. 3.25 at 3 bits, group 128)."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        return self.bits + 2 * scale_bits * self.groups(in_features) / in_features


# Names of the layers that stay in the checkpoint's own precision when a model is quantized without a recipe:
# routers choose experts by small differences.
DEFAULT_SKIP = ("gate", "router", "shared_expert_gate")

LM_HEAD = "lm_head"
EMBEDDING = "embed_tokens"
# Architectures whose class in vLLM takes no packed output head or no packed embedding: both stay as they are.
PLAIN_VOCABULARY = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "GPTNeoXForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
)
# Bits of the output head and of the token embedding; 16 leaves the weight in the checkpoint's own precision.
UNQUANTIZED_BITS = 16
VOCABULARY_BITS = (UNQUANTIZED_BITS, 8, 4)
DEFAULT_LM_HEAD_BITS = 8
DEFAULT_EMBEDDING_BITS = 8


@dataclass(frozen=True)
class VocabularyBits:
    """Bits of the matrices with one row per token of the vocabulary; None where the user gave nothing.

    Raises:
        UsageError: a value outside the supported set.
    """

    lm_head: int | None = None
    embedding: int | None = None

    def __post_init__(self) -> None:
        for name, bits in (("lm_head bits", self.lm_head), ("embedding bits", self.embedding)):
            if bits is not None and (bits not in VOCABULARY_BITS or isinstance(bits, bool)):
                raise UsageError(
                    f"{name} must be one of {VOCABULARY_BITS} (16 leaves it unquantized), got {bits!r}. Try 8."
                )

    def supported_by(self, architecture: str) -> VocabularyBits:
        """Return these widths, or 16 where vLLM's class of the model cannot run a packed head and embedding.

        Raises:
            UsageError: another width was asked for there.
        """
        if architecture not in PLAIN_VOCABULARY:
            return self
        for name, bits in ((LM_HEAD, self.lm_head), (EMBEDDING, self.embedding)):
            if bits not in (None, UNQUANTIZED_BITS):
                raise UsageError(
                    f"expected 16 bits for {name} of {architecture}, whose class in vLLM takes no packed vocabulary, "
                    f"got {bits}. Leave the option out."
                )
        return VocabularyBits(UNQUANTIZED_BITS, UNQUANTIZED_BITS)

    def resolved(self, tied: bool) -> tuple[int, int]:
        """Return the bits of head and embedding; ``tied``: the two are one tensor, and so have one width.

        Raises:
            UsageError: two widths given for one tensor.
        """
        if not tied:
            head = DEFAULT_LM_HEAD_BITS if self.lm_head is None else self.lm_head
            return head, DEFAULT_EMBEDDING_BITS if self.embedding is None else self.embedding
        given = {bits for bits in (self.lm_head, self.embedding) if bits is not None}
        if len(given) > 1:
            raise UsageError(
                f"expected one width for output head and embedding, which this model ties into one tensor, got "
                f"{self.lm_head} and {self.embedding}. Give only --lm-head-bits."
            )
        shared = given.pop() if given else DEFAULT_LM_HEAD_BITS
        return shared, shared
