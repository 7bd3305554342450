"""Train a small GPT, byte by byte, on the source code of Python's standard library.

    python examples/training/train_text.py                             # jax_flash's attention layer
    python examples/training/train_text.py --attention flax            # Flax's own, for comparison
    python examples/training/train_text.py --checkpoints /tmp/gpt      # saves now and then, and goes on from there

The model is ordinary Flax. One line concerns jax_flash: the attention layer, which has the parameters of Flax's.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import sysconfig
import time

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint
    from flax import nnx
    from tqdm import tqdm

    import jax_flash.flax
except ImportError as error:
    sys.exit(f"train_text.py: {error}. Install what it needs with: pip install '.[examples]'")

ATTENTION = {
    "jax_flash": jax_flash.flax.nnx.MultiHeadAttention,
    "flax": lambda *arguments, **options: nnx.MultiHeadAttention(*arguments, decode=False, **options),
}
# Dense bfloat16 TFLOP/s that the manufacturer gives, by what JAX calls the device.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
# Arguments that make another model or another course of training: a checkpoint fits only the same.
SETTINGS = ("steps", "batch", "length", "width", "layers", "heads", "seed", "learning_rate")


class Block(nnx.Module):
    """Attention and a feed-forward network, each around a residual."""

    def __init__(self, width, heads, *, attention, dtype, rngs):
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attend = ATTENTION[attention](heads, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.attention_norm(x), is_causal=True)
        return x + self.narrow(nnx.gelu(self.widen(self.feed_forward_norm(x))))


class GPT(nnx.Module):
    """Bytes [B, T] to logits [B, T, 256] of the byte that follows each."""

    def __init__(self, *, length, width, layers, heads, attention, dtype, rngs):
        self.bytes = nnx.Embed(256, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(length, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, attention=attention, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.bytes.attend(self.norm(x)).astype(jnp.float32)


def loss(model, text):
    """Mean cross-entropy, in nats per byte, of predicting each byte of [B, T + 1] from those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, text):
    value, gradients = nnx.value_and_grad(loss)(model, text)
    optimizer.update(model, gradients)
    return value


evaluate = nnx.jit(loss)


def load_text():
    """The modules of the standard library, as bytes: (to train on, to evaluate on)."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)
    if text.size < 1_000_000:
        sys.exit(f"train_text.py: found only {text.size} bytes of Python sources in {sysconfig.get_path('stdlib')}")
    split = int(0.95 * text.size)
    return text[:split], text[split:]


def extract(text, batch, length, seed, step):
    """Random extracts, int32 [batch, length + 1]: the same for a step whether or not training was interrupted."""
    starts = np.random.default_rng((seed, step)).integers(0, text.size - length, batch)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def flops_per_byte(model, length):
    """Multiplications and additions that training needs for a byte, forward and backward, without recomputation."""
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(model.blocks, nnx.Param))) + model.bytes.embedding.size
    width, layers = model.bytes.features, len(model.blocks)
    return 6 * weights + 6 * layers * length * width  # causal: half of the scores


def peak_tflops():
    """Of the default device, or None if it is not known."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), None)


class Checkpoints:
    """The last two states of a training in a folder; each appears there whole or not at all."""

    def __init__(self, folder, settings):
        self.settings = settings
        folder = pathlib.Path(folder).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"train_text.py: cannot keep checkpoints in {folder}: {error}")
        options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2)
        self.manager = orbax.checkpoint.CheckpointManager(folder, options=options)

    def restore(self, *modules):
        """Sets the modules to the last state; returns its number of steps, 0 if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0
        args = orbax.checkpoint.args
        saved = self.manager.restore(step, args=args.Composite(settings=args.JsonRestore()))["settings"]
        if differing := [name for name, value in self.settings.items() if saved.get(name) != value]:
            was = ", ".join(f"--{name.replace('_', '-')} {saved.get(name)}" for name in differing)
            sys.exit(f"train_text.py: the checkpoint in {self.manager.directory} was made with {was}")
        state = nnx.state(modules)
        shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        restored = self.manager.restore(step, args=args.Composite(state=args.StandardRestore(shapes)))["state"]
        nnx.replace_by_pure_dict(state, restored)
        nnx.update(modules, state)
        return step

    def save(self, step, *modules):
        """In the background."""
        args = orbax.checkpoint.args
        state = args.StandardSave(nnx.to_pure_dict(nnx.state(modules)))
        self.manager.save(step, args=args.Composite(state=state, settings=args.JsonSave(self.settings)))

    def close(self):
        """Waits for what is being saved."""
        self.manager.close()


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=ATTENTION, default="jax_flash")
    for name, default in dict(steps=600, batch=4, length=128, width=128, layers=3, heads=4, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default: 0.003")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on CPU")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="save there, and go on from what was saved there")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: 100, and at the end")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device, for the utilisation; default: its bfloat16 figure, if known"
    )
    arguments = parser.parse_args(argv)
    positive = ("steps", "batch", "length", "layers", "heads", "save_every")
    if min(getattr(arguments, name) for name in positive) < 1:
        parser.error("--steps, --batch, --length, --layers, --heads and --save-every must be at least 1")
    if arguments.width < 1 or arguments.width % arguments.heads:
        parser.error("--width must be a multiple of --heads")
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    if arguments.peak_tflops is not None and not arguments.peak_tflops > 0:
        parser.error("--peak-tflops must be positive")
    return arguments


def train(model, optimizer, text, arguments, first, checkpoints):
    """Steps from `first` on. Returns their losses, and the seconds of all but the first, which compiles."""
    losses = []
    with tqdm(range(first, arguments.steps), unit="step", initial=first, total=arguments.steps) as bar:
        for step in bar:
            losses.append(
                train_step(model, optimizer, extract(text, arguments.batch, arguments.length, arguments.seed, step))
            )
            if step == first:
                jax.block_until_ready(losses)
                start = time.perf_counter()
            # Seldom, since reading a loss waits for the device.
            if step % 10 == 9:
                bar.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}")
            if checkpoints and ((step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps):
                checkpoints.save(step + 1, model, optimizer)
        losses = [float(loss) for loss in losses]
    return losses, time.perf_counter() - start


def report_speed(model, arguments, steps, seconds):
    rate = steps * arguments.batch * arguments.length / seconds
    tflops = rate * flops_per_byte(model, arguments.length) / 1e12
    peak = arguments.peak_tflops or peak_tflops()
    utilisation = f", {100 * tflops / peak:.3g} % of the device's {peak:g}" if peak else ""
    print(f"{rate:,.0f} bytes/s (each is a token), {tflops:.3g} model TFLOP/s{utilisation}, compile time apart")


def main(argv=None):
    arguments = parse_arguments(argv)
    train_text, held_out = load_text()
    model = GPT(
        length=arguments.length,
        width=arguments.width,
        layers=arguments.layers,
        heads=arguments.heads,
        attention=arguments.attention,
        dtype=jnp.dtype(arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")),
        rngs=nnx.Rngs(arguments.seed),
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, arguments.learning_rate, arguments.steps // 10, arguments.steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{size:,} parameters, {train_text.size:,} bytes of text, attention by {arguments.attention}")

    first, checkpoints = 0, None
    if arguments.checkpoints:
        checkpoints = Checkpoints(arguments.checkpoints, {name: getattr(arguments, name) for name in SETTINGS})
        if first := checkpoints.restore(model, optimizer):
            print(f"goes on from step {first}, saved in {arguments.checkpoints}")
    if first == arguments.steps:
        sys.exit(f"train_text.py: nothing left to do: all {first} steps are done")
    try:
        losses, seconds = train(model, optimizer, train_text, arguments, first, checkpoints)
    except KeyboardInterrupt:
        sys.exit("train_text.py: interrupted")
    finally:
        if checkpoints:
            checkpoints.close()
    if len(losses) > 1:
        report_speed(model, arguments, len(losses) - 1, seconds)
    final = np.mean(
        [
            float(evaluate(model, extract(held_out, arguments.batch, arguments.length, arguments.seed, step)))
            for step in range(10)
        ]
    )
    print(f"loss in nats per byte: {losses[0]:.3f} at first, {np.mean(losses[-20:]):.3f} at last, {final:.3f} held out")
    return losses


if __name__ == "__main__":
    main()
