"""Every setting of a run: its type, default, bounds and help.

Every field's docstring is its help text in `everseg show`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _parted(value: Any) -> Any:
    """Read `a,b` as the list [a, b] and nothing as [], as a command line gives them; the rest is checked as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [] if value is None else value


_LIST = BeforeValidator(_parted)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DomainConfig(_Section):
    """The data of one domain."""

    dataset: str
    """Data set: a name of `everseg list datasets`, a data.yaml, or your own file.py:build."""
    root: str | None = None
    """Folder of the data set; default `data.root`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the data set's reader."""
    extra: dict[str, str] = Field(default_factory=dict)
    """Folders of further maps, as `data.extra`; default those of `data.extra`."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Class name in this data set -> name in the run; several may share one name, "ignore" makes a class void."""


class DataConfig(_Section):
    """Which images, and how they become network inputs."""

    dataset: str = "demo"
    """Data set: a name of `everseg list datasets`, a data.yaml, or your own file.py:build."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Domain name -> its data, for domain-incremental scenarios; `dataset` and `options` are not used then."""
    root: str | None = None
    """Folder of the data set (not needed by `demo` and by a data.yaml)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the data set's reader."""
    extra: dict[str, str] = Field(default_factory=dict)
    """Name -> folder with one map for each training image, such as {saliency: DIR}: pictures of one channel named after
    the image, DIR/ID.png or DIR/SPLIT/ID.png. They are cropped and turned with the image; some methods read them."""
    transform: Literal["crop", "resize"] = "crop"
    """Training images: "crop" = random resized crop to a square, "resize" = whole image at `size`, shifted by a
    few pixels."""
    crop: int = Field(default=512, ge=8, le=65536)
    """Side of the square training crop, in pixels."""
    size: tuple[Annotated[int, Field(ge=8, le=65536)], Annotated[int, Field(ge=8, le=65536)]] = (512, 1024)
    """Height and width of "resize", in pixels."""
    shift: int = Field(default=2, ge=0)
    """Training images of "resize" are moved by up to so many pixels in each direction."""
    shift_fill: Literal["void", "authors"] = "void"
    """Label of the strip a shift uncovers: void, or as in MDIL's code (class 0 at the right and at the bottom)."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the training crop's area relative to the image's (random resized crop)."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip in training."""
    scale_range: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Range of a factor by which training images of "crop" are resized before a square is cut out of them at a random
    place, filled up with ignored pixels where they are smaller (mmsegmentation, DeepLab); in place of `scale`."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that a training image is flipped upside down."""
    rotate: float = Field(default=0.0, ge=0, le=1)
    """Probability that a training image is turned by 90, 180 or 270 degrees, each as likely (aerial, microscopy)."""
    brightness: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    """Range of the factor on the values of training images, such as [0.6, 1.4]; 1 = unchanged."""
    contrast: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    """Range of the factor on the distance from the image's mean grey; 1 = unchanged."""
    saturation: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    """Range of the factor on the distance from each pixel's grey; 0 = grey, 1 = unchanged. RGB images only."""
    hue: tuple[Annotated[float, Field(ge=-0.5, le=0.5)], Annotated[float, Field(ge=-0.5, le=0.5)]] | None = (
        None
    )
    """Range of the turn of the hue in shares of the colour circle, such as [-0.05, 0.05]. RGB images only."""
    blur: tuple[Annotated[float, Field(ge=0, le=64)], Annotated[float, Field(ge=0, le=64)]] | None = None
    """Range of the deviation of a Gaussian blur of training images, in pixels after the crop; 0 = sharp."""
    evaluation: Literal["crop", "whole", "resize", "sliding"] = "crop"
    """How test images are seen: "crop" = short side resized to `crop` and centre-cropped (MiB's papers), "whole",
    "resize" = image and labels at `size` (MDIL), or "sliding" = at their own size through overlapping windows."""
    window: int | None = Field(default=None, ge=8, le=65536)
    """Side of the square windows of "sliding", in pixels; default `crop`."""
    overlap: float = Field(default=1 / 3, ge=0, le=0.9)
    """Share of its side that a window of "sliding" has in common with the next; where they overlap, logits are
    averaged."""
    normalisation: Literal["imagenet", "unit"] = "imagenet"
    """Scale of the network's inputs: "imagenet" = ImageNet's channel means and deviations, "unit" = [0, 1] (MDIL)."""
    workers: int = Field(default=2, ge=0, le=256)
    """Loader processes per rank; never changes the result."""
    skip_bad: int = Field(default=0, ge=0)
    """Training samples that may turn out unreadable and are replaced by others of the step, each reported once; one
    more, or any with 0, stops the run. Test images are never left out."""


class StepConfig(_Section):
    """One step of a domain-incremental or mixed sequence."""

    domain: str
    """Name of one of `data.domains`."""
    branch: str | None = None
    """Branch of the model; default the domain's own. Domains that name the same branch share it."""
    classes: list[int | str] | None = None
    """Classes taught when the domain is met first (names or raw ids, no background); default all."""
    add: list[int | str] | None = None
    """Classes added to a domain met before."""


class MemoryConfig(_Section):
    """Images of earlier steps that later steps are trained on again."""

    size: int = Field(default=0, ge=0)
    """Number of images kept after each step; 0 = no memory."""
    mix: Literal["replace", "append"] = "replace"
    """How they are trained: "replace" = a share of every batch comes from the memory (SSUL, MiB-AugM), "append" = they
    are further images of the step (DKD)."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of each batch that "replace" takes from the memory, rounded down to whole images."""
    selection: Literal["ssul", "reservoir", "random", "list", "method"] = "ssul"
    """Which images are kept: "ssul" = the classes take one in turn (DKD too), "reservoir" = the class with the most
    gives way (MiB-AugM), "random", "list" = those of `file`, "method" = the method chooses."""
    file: str | None = None
    """Names of the images that "list" keeps, one a line."""
    labels: Literal["as_stored", "seen", "current"] = "as_stored"
    """Labels of memory images: "as_stored" = the classes annotated when they were stored, "seen" = all classes taught
    so far (SSUL's code), "current" = the classes of the step alone (DKD)."""
    pseudo: Annotated[float, Field(ge=0, le=1)] | None = None
    """Score from which a class that a later step's model sees in the background counts as shown by an image, when
    images are chosen; null = only labels count."""
    pseudo_network: Literal["trained", "unloaded"] = "trained"
    """Model that sees those classes: the step's, or one whose weights were never loaded (DKD's and MiB-AugM's code)."""
    keep: Literal["references", "files"] = "references"
    """"references" = the images are read from the data again, "files" = image, mask and maps are copied into the
    run."""


class ScenarioConfig(_Section):
    """Which classes are taught in which step, and from which images."""

    kind: str = "class-incremental"
    """Scenario builder: "class-incremental", "domain-incremental" (also mixed), "extension" (new classes for the
    model of a bundle), or your own file.py:build."""
    bundle: str | None = None
    """Bundle whose model an "extension" starts from; its classes are the old ones, `task` names the new ones."""
    domain: str | None = None
    """Place or device that the images of an "extension" come from; default none, as in a bundle of one branch."""
    branch: str | None = None
    """Branch that these images take; default the bundle's only one. A name that the bundle does not know is a new
    branch."""
    like: str | None = None
    """Branch that a new one begins as a copy of, its classes included."""
    steps: list[StepConfig] | None = None
    """Steps of a domain-incremental scenario; default one per domain, in the order of `data.domains`."""
    task: str | list[list[int | str]] = "4-2"
    """Task name (15-5, 15-1, 100-50b, any N-M, offline), or explicit steps: lists of class names or raw ids."""
    protocol: Literal["disjoint", "overlapped", "sequential", "partitioned"] = "overlapped"
    """Which images a step may use: disjoint, overlapped, sequential (old classes stay labelled) or partitioned."""
    partition_draw: Literal["everseg", "authors"] = "everseg"
    """Random numbers that "partitioned" gives an image to one of its classes by: everseg's own, or those of MiB-AugM's
    code."""
    policy: Literal["mib-voc", "mib-ade", "plop-voc", "plop-ade", "plop", "ignore-void"] = "ignore-void"
    """Label convention: where void, old and future classes go in training and in tests."""
    order: list[int | str] | None = None
    """Class order (raw ids or names, without background) that N-M tasks cut into steps; default ascending ids."""
    lists: str | None = None
    """Image lists per step: "published" for the authors' own, or a folder of your train-<step>.npy/.txt files."""
    joint: bool = False
    """Teach everything at once: joint training (the upper bound), multi-task training over several domains."""
    single: bool = False
    """Train every step from scratch on its own: the single-task models that the relative drop compares with."""
    single_task: dict[str, Annotated[float, Field(gt=0, le=100)]] | None = None
    """Single-task mIoU per domain in percent, for the relative drop; default: of a finished single-task run beside
    this one."""
    class_weights: Literal["none", "computed", "published"] = "none"
    """Weights 1/ln(1.1 + share of pixels) in the cross-entropy: computed from the step's images, or published."""
    void_channel: bool = False
    """Give domains without background an extra output for void, never trained, as MDIL's code does."""
    validation: Literal["none", "split", "cross", "train"] = "none"
    """Validation images: none, the `val` split, 20 % held out of the step's training images, or all of those."""
    test_split: str = "val"
    """Split the results are measured on."""
    memory: MemoryConfig = MemoryConfig()
    """Images of earlier steps that later steps are trained on again: size, mix, share, selection and more."""


class ModelConfig(_Section):
    """Architecture and initial weights."""

    name: str = "deeplabv3-resnet101"
    """A name of `everseg list models`, or your own file.py:build."""
    encoder: str | None = None
    """Encoder of another library, under model.name=mlp or deeplabv3: hf:TYPE (random weights), hf:ORG/NAME[@REVISION]
    or hf:FOLDER of transformers, timm:NAME (random) or timm:NAME.TAG; null = the architecture's own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model's builder; with `encoder` also `config`, entries of the library's configuration,
    and `taps`, which of its maps."""
    output_stride: Literal[8, 16] | None = None
    """Input pixels per cell of the encoder's last map; default the architecture's own (DeepLabV3: 16)."""
    norm: Literal["bn", "abn", "iabn"] | None = None
    """Normalisation and activation: bn = BatchNorm+ReLU, abn = BatchNorm+leaky ReLU 0.01, iabn = with gamma |w|+eps;
    default the architecture's own (DeepLabV3: abn)."""
    weights: str | None = None
    """Initial encoder weights: a local file (torchvision, timm, In-place ABN or ERFNet names) or hf:org/name
    (a download)."""
    download: bool = False
    """Allow `weights` and `encoder` to be fetched from the network."""


class MethodConfig(_Section):
    """Which method, with its hyper-parameters as further keys (method.kd_weight=10)."""

    model_config = ConfigDict(extra="allow")

    name: str = "ft"
    """A name of `everseg list methods`, or your own file.py:Name."""

    @property
    def options(self) -> dict[str, Any]:
        """The hyper-parameters given."""
        return dict(self.__pydantic_extra__ or {})


class LrFactors(_Section):
    """Learning rates of the model's parts, relative to the step's."""

    encoder: float = Field(default=1.0, gt=0)
    """The encoder, with what branches own in it."""
    decoder: float = Field(default=1.0, gt=0)
    """The decoder, or the branches' decoders."""
    heads: float = Field(default=1.0, gt=0)
    """The classifiers."""
    old_heads: float | None = Field(default=None, gt=0)
    """Classifiers of earlier steps; default as `heads`."""
    new_heads: float | None = Field(default=None, gt=0)
    """Classifiers that the step adds; default as `heads`."""


class TrainConfig(_Section):
    """Optimisation of each step."""

    epochs: int = Field(default=30, ge=1)
    """Passes over the images of the first step."""
    epochs_next: int | None = Field(default=None, ge=1)
    """Passes over the images of each later step; default as `epochs`."""
    batch: int = Field(default=24, ge=1)
    """Images per iteration (one update of the weights) over all processes together."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that each process cuts its share of a batch into, one after the other, to save memory: their gradients add
    up to one update. `batch` stays the size of the whole; batch norms and means over valid pixels see a part."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of the first step."""
    lr_next: float | None = Field(default=0.001, gt=0)
    """Learning rate of later steps; null as `lr`."""
    schedule: Literal["poly", "step", "constant"] = "poly"
    """Learning rate over the iterations of a step."""
    schedule_by: Literal["iteration", "epoch"] = "iteration"
    """Whether the schedule falls with every iteration (MiB) or every epoch (MDIL); `step_size` and `warmup` count in
    the same unit."""
    power: float = Field(default=0.9, ge=0)
    """Exponent of the poly schedule."""
    step_size: int = Field(default=5000, ge=1)
    """Iterations (or epochs, see `schedule_by`) between two drops of the step schedule."""
    step_factor: float = Field(default=0.1, gt=0)
    """Factor of each drop of the step schedule."""
    min_lr: float = Field(default=0.0, ge=0)
    """Least learning rate of each part of the network, after all factors (SSUL, BARM: 1e-6)."""
    warmup: int = Field(default=0, ge=0)
    """Iterations (or epochs, see `schedule_by`) at the start of each step in which the learning rate rises with every
    iteration: the schedule, which begins at once, times a factor from `warmup_from` to 1."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """The same as a share of each step's iterations, such as 0.1; in place of `warmup`."""
    warmup_from: float = Field(default=1e-6, ge=0, le=1)
    """Factor of the warm-up's first iteration."""
    warmup_power: float = Field(default=1.0, gt=0)
    """Exponent of the warm-up: 1 = linear."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, Adam, or AdamW (weight decay apart from the gradient)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's and AdamW's two averages."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov momentum."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty on every trainable weight; with AdamW the share by which a learning rate of 1 would shrink it."""
    decay_norms: bool = True
    """Weight decay acts on norms, biases and all other weights of one dimension, too (MiB, MDIL: yes)."""
    lr_factors: LrFactors = LrFactors()
    """Factors on the learning rate by part: encoder, decoder, heads, or old_heads and new_heads apart."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor on the encoder's learning rate for each layer further from the decoder: d for the last layer, d^2 for the
    one before. Layers: stem and stages of everseg's encoders, blocks of other libraries'. Default 1."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; longer ones are scaled down to it before the update. Default no limit."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Share of the old value in a moving average of the weights, taken after every iteration. A step then ends with
    the average: it is tested, exported and continued; the raw weights are stored beside it. Default no average."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; losses are always fp32. fp16 is refused where a method reads gradients."""
    sync_norm: bool = False
    """Synchronise batch statistics over processes (CUDA only)."""
    shard: bool = False
    """Cut the network, the frozen teacher, gradients and optimiser into shards over the processes while a step is
    trained (FSDP2), for models that do not fit one device. The files are the same as without."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads per process; exact repetition needs the same number. Default: PyTorch's choice, recorded."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Iterations between checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Iterations between journal lines."""
    max_time: float | None = Field(default=None, gt=0)
    """Seconds after which the run saves itself and stops with exit code 75."""
    peer_timeout: float = Field(default=120.0, ge=2)
    """Seconds without a sign of life after which another process of the run counts as gone; all others then end."""
    max_iterations: int | None = Field(default=None, ge=1)
    """Stop each step after so many iterations (used by --dry-run)."""
    eval_batch: int = Field(default=8, ge=1)
    """Test images per batch and process (1 where images differ in size), or windows of an image seen through such."""


class RunConfig(_Section):
    """Everything that decides a run."""

    name: str = "run"
    """Name of the run's folder."""
    out: str = "runs"
    """Folder that holds the runs."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of initial weights, order, augmentation and random protocols."""
    tracker: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], _LIST] = ["tensorboard"]
    """Where curves and pictures go beside the journal: tracker=tensorboard,wandb; tracker=[] for nowhere. TensorBoard's
    files are written if it is installed; the others must be."""
    report: bool = True
    """Write report.html into the run's folder when the run is finished."""
    metrics: Annotated[list[Literal["boundary-iou", "per-image"]], _LIST] = []
    """Further scores of test images: boundary-iou (how well outlines are met; takes time) and per-image (mean, median
    and worst images). IoU, Dice and accuracy are always there."""
    data: DataConfig = DataConfig()
    scenario: ScenarioConfig = ScenarioConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()


HARMLESS = frozenset(
    {"name", "out", "tracker", "report", "metrics", "data.root", "data.domains.*.root", "data.extra",
     "data.domains.*.extra", "data.workers", "data.skip_bad", "model.download", "scenario.single_task",
     "train.checkpoint_every", "train.log_every", "train.max_time", "train.peer_timeout", "train.eval_batch",
     "train.shard"}
)  # fmt: skip
"""Keys that may differ when a run is resumed: they cannot change its result."""
