"""Cases of the table of situations that are none, and those in which no attention is vdcore's, each list checked."""

from zoo import MODELS

# One family of every mechanism.
FAMILIES = ("Latte", "AnimateDiff", "SVD", "Wan", "LTX", "CogVideoX", "Mochi", "HunyuanVideo", "Kandinsky5")


def only(*names: str) -> set[str]:
    """All models but these."""
    return set(MODELS) - set(names)


# ---- What the host cannot do itself: it has no such method, does not know the class, or fails in the call ----

CANNOT: dict[str, set[str]] = {}


def cannot(models: set[str], *situations: str) -> None:
    CANNOT.update(dict.fromkeys(situations, models))


cannot(only("Wan", "Wan I2V", "LTX", "Mochi", "CogVideoX", "HunyuanVideo", "MotifVideo"), "first block cache")
cannot(only("Wan", "Wan I2V", "LTX", "Kandinsky5", "Mochi", "CogVideoX", "HunyuanVideo", "MotifVideo"), "MagCache")
cannot(
    {"AnimateDiff", "SVD", "UNet3D", "I2VGenXL", "Cosmos", "SanaVideo", "ConsisID", "EasyAnimate"},
    "TaylorSeer",
    "pyramid attention broadcast",
    "a cache, taken off",
)
cannot(
    only(
        "Latte",
        "Allegro",
        "Wan",
        "SkyReelsV2",
        "SkyReelsV2 causal",
        "Mochi",
        "CogVideoX",
        "HunyuanVideo 1.5",
        "MotifVideo",
    ),
    "FasterCache",
)
cannot(only("Kandinsky5"), "FasterCache, distilled guidance")
cannot(
    {
        "Allegro",
        "SkyReelsV2",
        "SkyReelsV2 causal",
        "Helios",
        "LTX2",
        "LTX2.3",
        "Cosmos",
        "Kandinsky5",
        "SanaVideo",
        "ConsisID",
        "EasyAnimate",
        "HunyuanVideo 1.5",
    },
    "a block skipped",
)
cannot(
    only("Latte", "AnimateDiff", "SVD", "UNet3D", "I2VGenXL"),
    "attention skipped",
    "attention scores skipped",
    "guidance by skipped scores",
)
cannot({"LTX", "LTX2", "LTX2.3", "Kandinsky5", "Mochi", "MotifVideo"}, "smoothed energy guidance")
cannot(
    only("AnimateDiff", "SVD", "UNet3D", "I2VGenXL"),
    "perturbed attention of a U-Net",
    "default processors",
    "FreeNoise",
    "FreeNoise, disabled",
    "chunked feed-forward",
)
cannot(only("AnimateDiff"), "an IP-Adapter", "an IP-Adapter, unloaded")
cannot(only("AnimateDiff", "UNet3D", "I2VGenXL"), "FreeU")
cannot(
    {"Latte", "Allegro", "LTX2", "LTX2.3", "Cosmos", "Kandinsky5", "Mochi", "EasyAnimate", "MotifVideo"},
    "fused projections",
    "fused projections, taken apart",
)
cannot(
    {"Latte", "SVD", "UNet3D", "I2VGenXL", "Allegro", "EasyAnimate"},
    "LoRA",
    "LoRA, fused",
    "LoRA, fused and unfused",
    "LoRA, disabled",
    "LoRA, fused and unloaded",
    "LoRA, unloaded",
)
cannot({"LTX2", "LTX2.3"}, "accelerate's offloading", "accelerate's offloading, removed")
cannot({"UNet3D", "I2VGenXL"}, "gradient checkpointing")
cannot(only("Allegro", "LTX", "LTX2", "LTX2.3", "Mochi", "HunyuanVideo 1.5", "MotifVideo"), "an empty text")
cannot(
    only("Allegro", "LTX", "LTX2", "LTX2.3", "Mochi", "HunyuanVideo", "HunyuanVideo 1.5", "MotifVideo"),
    "a text padded on the left",
    "a text with holes",
)
cannot({"Mochi"}, "make_fx over fake tensors")
cannot({"HunyuanVideo"}, "torch.jit.trace")
# Of those that compile, one family of every mechanism.
cannot({"Latte", "AnimateDiff", "SVD", "CogVideoX", "Mochi"}, "blocks compiled, and run")
for text in ("an empty text", "a text padded on the left", "a text with holes"):
    cannot(CANNOT[text], f"compiled, {text}")

# Of one family of every mechanism as well.
cannot({"Latte", "SVD"}, "two LoRAs", "two LoRAs, one deleted", "LoRA with norms of its own")
cannot({"Latte", "SVD", "Kandinsky5"}, "LoRA, scaled by the call")
cannot({"Latte", "Mochi"}, "processors set as they are", "processors made anew")
cannot(
    {"Latte", "Wan", "LTX", "CogVideoX", "Mochi", "HunyuanVideo", "Kandinsky5"},
    "processors of another kind",
)
cannot({"Kandinsky5"}, "in float64", "in bfloat16", "in float16")
cannot({"SVD"}, "channels last")
cannot({"AnimateDiff"}, "one frame", "seven frames")
cannot({"Latte", "AnimateDiff", "SVD", "LTX"}, "one timestep for all")
cannot({"Latte", "AnimateDiff", "SVD", "LTX", "CogVideoX", "Mochi"}, "one text for all")
cannot(
    {"Kandinsky5"},
    *(f"PEFT's {kind} around" for kind in ("LoRA", "DoRA", "IA3", "LoKr")),
    *("PEFT's LoRA around, merged", "PEFT's LoRA around, merged and unloaded"),
)


# ---- Where the result is right and no attention is served ----

# Hooks and caches on attention that come first are left in place; processors that the host sets anew are the host's;
# models that are made from another are not swapped; a function mode wants torch's functions.
NOT_SERVED: dict[tuple[str, str], set[str]] = {}

NOT_SERVED["TaylorSeer", "before"] = {"MotifVideo"}
NOT_SERVED["pyramid attention broadcast", "before"] = only(
    "AnimateDiff", "SVD", "UNet3D", "I2VGenXL", "Cosmos", "SanaVideo", "Mochi", "ConsisID", "EasyAnimate"
)
NOT_SERVED["FasterCache", "before"] = {"CogVideoX", "MotifVideo"}
NOT_SERVED["default processors", "after"] = {"AnimateDiff", "SVD", "UNet3D", "I2VGenXL"}
NOT_SERVED["default processors", "before"] = {"AnimateDiff", "SVD", "UNet3D", "I2VGenXL"}
NOT_SERVED["an IP-Adapter", "after"] = {"AnimateDiff"}
NOT_SERVED["an IP-Adapter, unloaded", "after"] = {"AnimateDiff"}
NOT_SERVED["fused projections", "after"] = {"AnimateDiff", "UNet3D", "I2VGenXL", "CogVideoX"}
NOT_SERVED["saved and loaded", "after"] = only()
NOT_SERVED["saved and loaded", "before"] = only()
NOT_SERVED["made from its configuration", "after"] = only()
NOT_SERVED["made from its configuration", "before"] = only()
NOT_SERVED["a hook", "before"] = only("Mochi", "ConsisID")
NOT_SERVED["two hooks, the first removed", "before"] = only("Mochi", "ConsisID")
NOT_SERVED["a function mode", "after"] = only()
NOT_SERVED["a function mode", "before"] = only()

NOT_SERVED["processors made anew", "after"] = set(FAMILIES)
NOT_SERVED["processors of another kind", "after"] = {"AnimateDiff", "SVD"}
NOT_SERVED["processors of another kind", "before"] = {"AnimateDiff", "SVD"}
NOT_SERVED["processors inside of others", "before"] = set(FAMILIES) - {"Mochi"}
NOT_SERVED["classes of processors changed", "after"] = set(FAMILIES) - {"Mochi"}
NOT_SERVED["classes of processors changed", "before"] = set(FAMILIES) - {"Mochi"}

# ---- Where results differ by more than 1e-4 ----

# The host rounds rotated queries and keys to bfloat16: a last bit before it is 0.4 % of a number after it.
TOLERANCES = dict.fromkeys(
    (
        (what, "Kandinsky5")
        for what in (
            *("gradients", "compiled gradients", "gradient checkpointing", "gradient checkpointing, turned off"),
            *("DistributedDataParallel", "FSDP2", "backward hooks", "saved tensors elsewhere", "torch.func.grad"),
            *("DistributedDataParallel, static graph", "torch's checkpoint wrappers", "several gradients at once"),
        )
    ),
    2e-3,
)
# Of numbers with 8 and 11 bits; autocast rounds again at every product.
TOLERANCES |= {("in bfloat16", name): 5e-2 for name in FAMILIES}
TOLERANCES |= {("autocast", name): 5e-2 for name in FAMILIES}
TOLERANCES |= {("in float16", name): 5e-3 for name in FAMILIES}
