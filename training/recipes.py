"""The two models: their shape in GGUF's terms, and how each is trained. Standard library only, as training needs."""

from dataclasses import asdict, dataclass, replace
from typing import Any

BEGIN = 0
"""Id of the only special token, <|endoftext|>: it begins every window, and ends every document."""
RMS_EPS, ROPE_BASE = 1e-5, 10000.0
ROUTER_SUM_LEAST = 6.103515625e-5
"""llama.cpp's floor of the sum that router weights are divided by."""


@dataclass(frozen=True)
class Shape:
    """Shape of a model; fields as in moelib's `Geometry`, lengths in elements."""

    architecture: str
    block_count: int
    leading_dense_block_count: int
    embedding_length: int
    feed_forward_length: int
    expert_feed_forward_length: int
    expert_count: int
    expert_used_count: int
    expert_shared_count: int
    head_count: int
    head_count_kv: int
    vocab_size: int
    context_length: int
    original_context_length: int | None = None

    @property
    def head_length(self) -> int:
        return self.embedding_length // self.head_count

    @property
    def has_biases(self) -> bool:
        """Whether norms, attention and output have biases."""
        return self.architecture == "phimoe"

    @property
    def router_sums_to_one(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum, as llama.cpp's graph of phimoe does."""
        return self.architecture == "phimoe"

    @property
    def rope_pairs_halves(self) -> bool:
        """Whether RoPE turns element i with i + half (NEOX), or each even element with the next (llama.cpp's NORM)."""
        return self.architecture == "phimoe"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int = 3000
    batch: int = 32
    """Windows of `context_length` tokens a step."""
    learning_rate: float = 2e-3
    """At its height; then a cosine down to a fiftieth."""
    warmup_steps: int = 150
    weight_decay: float = 0.1
    """Of matrices alone."""
    dropout: float = 0.2
    """Of what attention and feed-forward networks add."""
    balance: float = 0.01
    """Weight of the load-balancing loss: 1 for even use of the experts, up to their number for one expert alone."""
    z: float = 1e-4
    """Weight of the square of the router's log-sum-exp, which keeps its logits small."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 20261127
    valid_every: int = 100


@dataclass(frozen=True)
class Model:
    name: str
    title: str
    shape: Shape
    recipe: Recipe

    def facts(self) -> dict[str, Any]:
        """Shape and recipe, as they are recorded."""
        return {"name": self.name, "title": self.title, "shape": asdict(self.shape), "recipe": asdict(self.recipe)}

    def using(self, **recipe: Any) -> "Model":
        """The same model by another recipe; None keeps a setting."""
        return replace(self, recipe=replace(self.recipe, **{k: v for k, v in recipe.items() if v is not None}))


# Expert counts: not 8, for which llama-quantize has rules of its own (made for Mixtral) that neither original meets.
PHI = Model(
    "trained-phimoe",
    "trained-phimoe 11M",
    Shape(
        architecture="phimoe",
        block_count=4,
        leading_dense_block_count=0,
        embedding_length=256,
        feed_forward_length=256,
        expert_feed_forward_length=256,
        expert_count=12,
        expert_used_count=2,
        expert_shared_count=0,
        head_count=4,
        head_count_kv=1,  # a quarter, as in Phi-3.5-MoE
        vocab_size=2048,
        context_length=1024,
        original_context_length=1024,
    ),
    Recipe(),
)
DEEPSEEK = Model(
    "trained-deepseek",
    "trained-deepseek 12M",
    Shape(
        architecture="deepseek",
        block_count=5,
        leading_dense_block_count=1,
        embedding_length=256,
        feed_forward_length=704,  # 2.75 x 256, where 10944 is 42.75 x 256
        expert_feed_forward_length=128,  # 0.5 x 256, where 1408 is 5.5 x 256: so two shared experts fit k-quants
        expert_count=20,
        expert_used_count=6,
        expert_shared_count=2,
        head_count=4,
        head_count_kv=4,
        vocab_size=2048,
        context_length=1024,
    ),
    Recipe(),
)
MODELS = {"phi": PHI, "deepseek": DEEPSEEK}
