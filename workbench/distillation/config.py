"""The settings of an alignment, and of one training run, which holds one."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.errors import InputError
from workbench.matching.config import Activation, Compared
from workbench.models.names import Attention
from workbench.similarity.names import Estimator, Measure

Pairs = Literal["sum", "mean"]
AlignmentLoss = Literal["similarity", "interchange", "both"]
TaskLoss = Literal["ce_teacher", "ce_truth", "kl_teacher", "reverse_kl_teacher", "jsd_teacher", "none"]
TeacherSource = Literal["memory", "shards", "live"]
WeightSchedule = Literal["constant", "linear_warmup", "cosine_warmup", "linear_decay", "cosine_decay"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EndpointConfig:
    """Where a teacher that is not loaded answers: an OpenAI-compatible server (vLLM, SGLang, llama.cpp)."""

    url: str
    """Up to the version, e.g. http://localhost:8000/v1. No key in it: this is written into a run's description."""
    top: Annotated[int, Field(ge=1)] = 20
    """How many log-probabilities of the answer's token are asked for; the KL sees the others as one outcome."""
    key_variable: str = "WORKBENCH_ENDPOINT_KEY"
    """The environment variable that holds the server's key, where it wants one; the key itself is nowhere written."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or "@" in self.url or "?" in self.url:
            raise InputError(
                "endpoint.url is an address such as http://localhost:8000/v1, without a key; put that into the "
                f"environment variable {self.key_variable}."
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class AlignmentConfig:
    """What of a matched pair is aligned, where, and how strongly."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """lambda of eq 7; 0 leaves the alignment out."""
    estimator: Estimator = "biased"
    """Of CKA in the loss; the paper's is the biased one."""
    measure: Measure = "linear_cka"
    """What alignment is measured by (see `workbench.similarity.measures`); the paper's is linear CKA. `attention_kl`
    needs activation `pattern`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the measure by name, e.g. `{fraction: 0.2}` of rbf_cka."""
    pairs: Pairs = "sum"
    """Whether the loss is the sum over pairs (the paper) or their mean, which makes lambda independent of how many
    there are."""
    activation: Activation = "z"
    """What of a head: its output before W_O, what it writes to the residual stream (`result`), or its attention
    probabilities (`pattern`, for `attention_kl`)."""
    positions: str = "own"
    """`own`: where each head acts in its circuit; `own+last`: there and at a named position; or a named position for
    all (`last` is the paper's reading)."""
    broadened: dict[str, str] = Field(default_factory=dict)
    """Own positions that are read elsewhere, e.g. `{earlier_label: labels}`: heads that act at the queried box's label
    are aligned at every label."""
    compared: Compared = "activations"
    """What of the heads is aligned: their activations on the clean prompts (the paper), or the differences clean minus
    corrupt, from which drops out what the two prompts share. Costs a forward of the student more."""
    loss: AlignmentLoss = "similarity"
    """1 - similarity of each pair (the paper); causal alignment (DIITO): KL between the models' outputs while matched
    heads take their values on the corrupt prompt; or the sum of both. Interchange costs two forwards more."""
    interchange_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the interchange beside the similarity, where the loss is `both`; lambda stands before their sum."""
    interchanged: Literal["all", "one"] = "all"
    """Which pairs are interchanged in a prompt: all together, or one, another from prompt to prompt."""
    pair_weights: Literal["equal", "impact"] = "equal"
    """Weights of the pairs in the loss: equal (the paper), or the size of the student head's ablation impact, with mean
    1."""

    @property
    def similar(self) -> bool:
        """Whether the loss measures similarity."""
        return self.loss != "interchange"

    @property
    def interchanges(self) -> bool:
        """Whether heads are interchanged."""
        return self.loss != "similarity"

    @property
    def runs(self) -> int:
        """The student's forwards in a step: on the clean prompts, on the corrupt ones, with heads interchanged."""
        return 1 + (self.differs or self.interchanges) + self.interchanges

    @property
    def differs(self) -> bool:
        """Whether the similarity is one of differences."""
        return self.similar and self.compared == "differences"


LATER: Mapping[str, Any] = {
    "compared": "activations",
    "loss": "similarity",
    "interchange_weight": 1.0,
    "interchanged": "all",
    "pair_weights": "equal",
}
"""Settings of an alignment that came later, at what they were before there was a choice: a training of before has an
identity without them."""
MANNERS = frozenset({"shared_prefixes"})
"""Settings, of evaluations too, that say how the same is computed, not what: no identity counts them."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """One training run. The paper leaves most of these open; each is a setting with its default stated here."""

    task_loss: TaskLoss = "ce_teacher"
    """Cross-entropy on the teacher's labels (the paper) or on the ground truth; KL to the teacher's distribution,
    forward or reverse; the Jensen-Shannon divergence from it; or none. From a teacher with another tokenizer only its
    labels, among the prompts' answers as words."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the KL and Jensen-Shannon losses."""
    answers: Literal["whole", "first"] = "whole"
    """Of prompts whose answers have several tokens (`multi_token`): the task loss over the whole answer, each token
    given the prompt and those before it, or over its first token alone. The answer is the right one; with `ce_teacher`
    the teacher's own, by greedy decoding. Heads are aligned where they are matched; `last` is the prompt's last token,
    `answering` (as a position, or `broadened: {last: answering}`) every token that predicts one of the answer's."""
    alignment: AlignmentConfig | None = None
    """What is aligned and how; None leaves the alignment out. In a recipe it is the `alignment` beside this."""
    weight_schedule: WeightSchedule = "constant"
    """lambda over the steps: constant as in the paper; from 0 up to `weight`; or from `weight` down to 0."""
    weight_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps that the rise or fall of lambda takes, after which it stays; None: all steps."""
    heads: Literal["matched", "circuit"] = "matched"
    """Whose slices train where a condition trains heads: the matched ones, or the student's whole circuit."""
    most: Annotated[int, Field(ge=1)] | None = None
    """At most so many of those heads train, the ones of the largest mean ablation impact (`matching.metric`). Every
    matched pair is aligned all the same: what a few heads write is judged by all that read it. None: all of them
    train."""
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    """Train a low-rank change of each of these heads' matrices in place of the whole slices (biases then stay); None:
    the whole slices."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The change is `lora_alpha / lora_rank` times the product of its two factors."""
    steps: Annotated[int, Field(ge=1)] = 150
    batch: Annotated[int, Field(ge=4)] = 64
    """Prompts in a step, over all processes; with CKA also the number of examples m at a single position."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches into which a process splits its share of a step's batch."""
    alignment_batch: Literal["whole", "micro"] = "whole"
    """Whether the alignment sees the whole batch of a step, which a split batch pays with a second forward, or averages
    over micro-batches, which is another objective with a smaller m."""
    precision: Literal["full", "bf16"] = "full"
    """`bf16`: the student's forward under autocast to bfloat16; weights, losses and alignment stay in float32."""
    attention: Attention = "eager"
    """How the student's attention is computed: step by step, with a hook on each (`eager`), or in one kernel (`sdpa`):
    the numbers to float32 rounding, in 0.76 of a step's time for the bundled student, of long prompts in a wide model
    about as long. Not with activation `pattern`, and not in every family."""
    shared_prefixes: bool = True
    """Prompts of a batch that begin alike (the questions of a scene) run as one prefix and its continuations: losses
    and gradients to float32 rounding. Where that is not so (dropout, bfloat16, answers of several tokens, activation
    `pattern`, models whose attention asks for more than who sees whom), and on corrupt prompts, prompt by prompt."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of the trained slices."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations on the validation prompts, which are neither training nor test prompts; None: no
    evaluation."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations in a row without a better one than the best; None: never."""
    restore_best: bool = False
    """End with the weights of the best evaluation, not of the last step."""
    trackers: tuple[Tracker, ...] = ()
    """Where the log goes besides its JSONL file, through accelerate."""

    @property
    def weight(self) -> float:
        """lambda of eq 7; 0 without an alignment."""
        return 0.0 if self.alignment is None else self.alignment.weight

    @property
    def activation(self) -> Activation:
        """What of a head is aligned."""
        return (self.alignment or AlignmentConfig()).activation


def interchanges(config: TrainingConfig) -> bool:
    """Whether a training interchanges heads, so that it compares the models' outputs."""
    return config.alignment is not None and config.weight > 0 and config.alignment.interchanges
