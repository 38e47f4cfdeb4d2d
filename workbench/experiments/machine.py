"""What standalone scripts are made of, as text: each holds only the parts that its changes need.

A place in a script is where a value passes: the module's path, the port, which tensor of the value, and into
how many heads the tensor's last axis is parted, if it is (0: its second axis is the heads already).
"""

HEAD = '''
"""An experiment on a diffusion model, exported by Diffusion Workbench.

Needs diffusers and torch alone. Run it: python SCRIPT [--model FOLDER_OR_HUB_ID] [--out IMAGE.png]
"""

'''

ONE_IMAGE = """
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=MODEL, help="folder or Hub id of the pipeline")
parser.add_argument("--out", default="patched.png", help="where the image goes")
options = parser.parse_args()
"""

MANY_IMAGES = """
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=MODEL, help="folder or Hub id of the pipeline")
parser.add_argument("--out", default="sweep", help="the folder where images and the table go")
options = parser.parse_args()
"""

OPEN = """
torch.set_num_threads(THREADS)
pipeline = DiffusionPipeline.from_pretrained(options.model, revision=REVISION)
"""

GENERATE = '''
def generate(seed, settings=SETTINGS, pipeline=pipeline, **words):
    """Run the pipeline with the experiment's settings and noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(**words, generator=generator, **settings).images[0]
'''

BRANCHES = '''
def beside(name):
    """Return where a branch's image goes: beside the other, under the branch's name."""
    out = pathlib.Path(options.out)
    return out.with_name(f"{out.stem}-{name}{out.suffix}")
'''

PLAIN = """
generate(**TARGET).save(options.out)
"""

MACHINE = '''
class Run:
    """A run of the pipeline: its image, and what repeats it."""

    def __init__(self):
        self.image = None
        self.predictions = []  # what the scheduler was given, one a step of its own
        self.results = []  # what it made of them
        self.calls = 0  # of the denoiser
        self.call = None  # the one that goes on


kept = {}  # what runs leave for later ones, by run, place and call


def pick(value, leaf):
    """Return the tensor of a module's value that a change is about; of several, the only one."""
    for key in leaf:
        value = list(value.values())[key] if isinstance(value, dict) and isinstance(key, int) else value[key]
    if not isinstance(value, torch.Tensor):
        value = next(each for each in (value.values() if isinstance(value, dict) else value))
    return value


def put(value, leaf, new):
    """Return the value with that tensor replaced."""
    if not leaf and isinstance(value, torch.Tensor):
        return new
    key = leaf[0] if leaf else 0
    if isinstance(value, dict) and isinstance(key, int):
        key = list(value)[key]
    changed = put(value[key], leaf[1:], new)
    if isinstance(value, (tuple, list)):
        return type(value)(changed if i == key else each for i, each in enumerate(value))
    return type(value)(**{**value, key: changed})


def by_head(tensor, place):
    """View (batch, tokens, width) as (batch, heads, tokens, width of a head), where a place has heads."""
    heads = place[3]
    return tensor.view(*tensor.shape[:-1], heads, -1).transpose(1, 2) if heads else tensor


def rows(tensor, index, count):
    """Return one guidance branch's rows of a batch that holds several, one after the other."""
    width = tensor.shape[0] // count
    return tensor[index * width : (index + 1) * width]


def seen(run, place, given):
    """Return the rows that a run left at a place: of which call, of which branch, of how many."""
    call, index, count = given
    return rows(by_head(kept[(run, place, call)], place), index, count)


def chosen(change, place, name="tokens"):
    """Return the index of what is changed in one branch's rows: heads, or places of a sequence."""
    heads, tokens = change.get("heads"), change.get(name)
    if place[3] is None:
        return (slice(None),) if tokens is None else (slice(None), tokens)
    if tokens is None:
        return (slice(None), slice(None) if heads is None else heads)
    return (slice(None), slice(None) if heads is None else torch.tensor(heads)[:, None], tokens)


def apply(change, call, value):
    """Make a change, if the call is one of its own."""
    if call not in change["calls"]:
        return value
    place = change["at"][0]
    changed = pick(value, place[2]).clone()
    for number, (index, count) in enumerate(change["calls"][call]):
        part = rows(by_head(changed, place), index, count)
        if "tokens" in change or "heads" in change:
            new, where = part.clone(), chosen(change, place)
            new[where] = DO[change["do"]](change, call, number, part[where])
        else:
            new = DO[change["do"]](change, call, number, part)
        if "strength" in change:
            new = part + change["strength"] * (new - part)
        if "mask" in change:
            share = spread(change, part, place)
            new = torch.where(share == 1, new, part + share * (new - part))
        part[:] = new
    return put(value, place[2], changed)


def at_output(hooks, module, look):
    """Let ``look`` see, and perhaps replace, what a module returns."""
    hooks.callback(module.register_forward_hook(lambda module, inputs, output: look(output)).remove)


def at_input(hooks, module, look):
    """The same with the first of its inputs."""

    def first(module, inputs, named):
        if inputs:
            return (look(inputs[0]), *inputs[1:]), named
        name = next(iter(named))
        return inputs, {**named, name: look(named[name])}

    hooks.callback(module.register_forward_pre_hook(first, with_kwargs=True).remove)


def at_inputs(hooks, module, look):
    """The same with all of its inputs, those by position and those by name."""
    handle = module.register_forward_pre_hook(lambda _, *inputs: look(inputs), with_kwargs=True)
    hooks.callback(handle.remove)


HOOKS = {"output": at_output, "input": at_input, "inputs": at_inputs}
EDITS = {}


def run(which, settings=SETTINGS, keeps=None, changes=(), after=None, pipeline=pipeline):
    """Run the pipeline once.

    Keeps what changes take from the run named ``keeps``, and makes the ``changes``. With ``after``, which is
    another run and how many calls of its scheduler, it repeats that run so far.
    """
    now, scheduler = Run(), {"input": [], "output": []}
    before, ticks = after or (now, 0)

    def enter(module, inputs):
        now.call = now.calls
        now.calls += 1

    def leave(module, inputs, output):
        now.call = None

    step = pipeline.scheduler.step

    @functools.wraps(step)
    def stepped(prediction, *rest, **named):
        tick = len(now.predictions)
        for look in scheduler["input"]:
            prediction = look(tick, prediction)
        now.predictions.append(before.predictions[tick] if tick < ticks else prediction)
        made = step(now.predictions[-1], *rest, **named)
        for look in scheduler["output"]:
            made = look(tick, made)
        now.results.append(before.results[tick] if tick < ticks else made)
        return now.results[-1]

    def keep(place, call, value):
        if call is not None and len(now.predictions) >= ticks:
            kept[(keeps, place, call)] = pick(value, place[2]).clone()
        return value

    def hook(place, look):
        path, port = place[:2]
        if path == "scheduler.step":
            scheduler[port].append(look)
            return
        component, _, inside = path.partition(".")
        module = getattr(pipeline, component).get_submodule(inside)
        HOOKS[port](hooks, module, lambda *value: look(now.call, *value))

    denoisers = [getattr(pipeline, name) for name in DENOISERS]
    with contextlib.ExitStack() as hooks:
        for each in denoisers:
            hooks.callback(each.register_forward_pre_hook(enter).remove)
        taken = [place for each in CHANGES if keeps in each.get("runs", ()) for place in each["from"]]
        for place in dict.fromkeys(taken):
            hook(place, functools.partial(keep, place))
        for change in changes:
            for place in change["at"]:
                hook(place, functools.partial(EDITS.get(change["do"], apply), change))
        for each in denoisers:
            hooks.callback(each.register_forward_hook(leave).remove)
        pipeline.scheduler.step = stepped
        hooks.callback(delattr, pipeline.scheduler, "step")
        now.image = generate(**which, settings=settings, pipeline=pipeline)
    return now
'''

MASK = '''
def resized(picture, shape):
    """Return a picture of numbers at another size."""
    picture = torch.tensor(picture)
    if tuple(picture.shape) == tuple(shape):
        return picture
    return torch.nn.functional.interpolate(
        picture[None, None], size=tuple(shape), mode="bilinear", align_corners=False
    )[0, 0]


def spread(change, value, place):
    """Return a mask of the picture at the size of a value: (batch, channels, rows, columns) or in a row."""
    if value.ndim > 3 and place[3] is None:
        return resized(change["mask"], value.shape[-2:]).to(value)
    rows, columns = change["picture"]  # of the latents
    sizes = [(-(-rows // side), -(-columns // side)) for side in (1, 2, 4, 8, 16, 32, 64, 128)]
    size = next(each for each in sizes if each[0] * each[1] == value.shape[-2])
    return resized(change["mask"], size).flatten()[:, None].to(value)
'''

NOISE = '''
def drawn(seed, shape):
    """Return the initial noise of a seed, as the pipeline draws it."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def mixed(own, other, share):
    """Return noise that is the other for a share of its variance."""
    share = torch.as_tensor(share)
    return (1 - share).sqrt() * own.float() + share.sqrt() * other.float()
'''

TAKEN = '''
def taken(change, run, given, value):
    """Return what another run has for these rows."""
    place = change["from"][0]
    found = seen(run, place, given)
    found = found[chosen(change, place, "from_tokens" if "from_tokens" in change else "tokens")]
    return found.expand_as(value).to(value)
'''

PIXELS = '''
def pixels(image):
    """Return a picture as numbers from 0 to 1."""
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).double() / 255
'''

MEASURES = {
    "towards": '''
def towards(image, target, source):
    """Return how far a picture went from the target's to the source's: 0 is the one, 1 the other."""
    way = pixels(source) - pixels(target)
    length = (way**2).sum().item()
    return ((pixels(image) - pixels(target)) * way).sum().item() / length if length else 0.0
''',
    "difference": '''
def difference(image, other):
    """Return the mean absolute difference of two pictures' pixels."""
    return (pixels(image) - pixels(other)).abs().mean().item()
''',
    "psnr": '''
def psnr(image, other):
    """Return the peak signal-to-noise ratio of two pictures in decibels."""
    error = ((pixels(image) - pixels(other)) ** 2).mean()
    return (-10 * error.log10()).item()
''',
    "ssim": '''
def ssim(image, other):
    """Return the structural similarity of two pictures: Gaussian windows of 11 pixels, deviation 1.5."""
    window = torch.exp(-(torch.arange(-5.0, 6.0).double() ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).outer(window / window.sum())[None, None]
    shape = (image.height, image.width, 3)
    one, two = (pixels(each).reshape(shape).movedim(2, 0)[:, None] for each in (image, other))
    mean, others, square, others_square, product = (
        torch.nn.functional.conv2d(each, window) for each in (one, two, one**2, two**2, one * two)
    )
    alike = (2 * mean * others + 0.01**2) * (2 * (product - mean * others) + 0.03**2)
    apart = square - mean**2 + others_square - others**2 + 0.03**2
    return (alike / ((mean**2 + others**2 + 0.01**2) * apart)).mean().item()
''',
}
"""How a script measures the picture of a cell, beside the pictures of its runs."""

SWEEP = """
out = pathlib.Path(options.out)
out.mkdir(parents=True, exist_ok=True)
with (out / "cells.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow([*AXES, *MEASURED, "image"])
    for number, pair in enumerate(PAIRS):
        kept.clear()
        target = run(pair["target"])
        leaves = {"after": (target, pair["leaves"])} if "leaves" in pair else {}
        source = run(pair["source"], keeps="source", **leaves)
        if CORRUPT:
            target = run(pair["target"], changes=[CHANGES[each] for each in CORRUPT])
        for which in pair["further"]:
            run({"prompt": which[1], "seed": pair["target"]["seed"]}, keeps=which)
        for place, (labels, of, changed) in enumerate(CELLS):
            if of == number:
                name = f"{place:05}.png"
                image = run(pair["target"], changes=[CHANGES[each] for each in (*CORRUPT, *changed)]).image
                image.save(out / name)
                pictures = {"target": target.image, "source": source.image}
                found = [of(image, *map(pictures.get, needs)) for of, *needs in MEASURED.values()]
                table.writerow([*labels, *found, name])
                file.flush()
"""

KINDS = {
    "patch": '''
def patched(change, call, number, value):
    """Return what another run has in place of one branch's rows."""
    return taken(change, change["runs"][0], change["given"][call][number], value)
''',
    "mean": '''
def averaged(change, call, number, value):
    """Return the mean of what other runs have."""
    found = [taken(change, run, change["given"][call][number], value) for run in change["runs"]]
    return torch.stack(found).mean(0)
''',
    "replace": '''
def replaced(change, call, number, value):
    """Return the given numbers in place of one branch's rows."""
    return torch.tensor(change["value"]).to(value).expand(value.shape)
''',
    "zero": '''
def zeroed(change, call, number, value):
    """Return nothing in place of one branch's rows."""
    return torch.zeros_like(value)
''',
    "noise": '''
def noised(change, call, number, value):
    """Return noise with the mean and deviation of each row."""
    seed = change["seed"] * 1_000_003 + change.get("calls_of_steps", {}).get(call, call)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(value.shape, generator=generator).to(value)
    over = tuple(range(1, value.ndim))
    return value.mean(over, keepdim=True) + noise * value.std(over, keepdim=True)
''',
    "corrupt": '''
def corrupted(change, call, number, value):
    """Return one branch's rows with noise of their own size, the same in every call."""
    generator = torch.Generator("cpu").manual_seed(change["seed"])
    noise = torch.randn(value.shape[1:], generator=generator).to(value)
    return value + value.flatten(1).std(1).reshape(-1, *[1] * (value.ndim - 1)) * noise
''',
    "scale": '''
def scaled(change, call, number, value):
    """Return one branch's rows, multiplied."""
    return value * change["factor"]
''',
    "steer": '''
def direction(change):
    """Return the direction of a steering: the given one, or from the second to the first of the pairs."""
    if "direction" in change:
        return torch.tensor(change["direction"])
    place = change["from"][0]
    looked = []
    for run in change["runs"]:
        values = [seen(run, place, given)[chosen(change, place)].mean(0) for given in change["seen"]]
        looked.append(torch.stack(values).float())
    differences = torch.stack([one - other for one, other in zip(looked[::2], looked[1::2])])
    mean = differences.mean((0, 1))
    if change["method"] == "pca":
        first = torch.linalg.svd(differences.flatten(0, 1).flatten(1), full_matrices=False).Vh[0]
        mean = ((mean.flatten() @ first) * first).reshape(mean.shape)
    return mean


def steered(change, call, number, value):
    """Return one branch's rows, moved along the direction."""
    known = ("direction", id(change))
    if known not in kept:
        kept[known] = direction(change)
    return value + kept[known].to(value)
''',
    "module": '''
def through(change, call, number, value):
    """Return what a module of one's own makes of one branch's rows."""
    if "made" not in change:
        home, _, name = change["module"].partition(":")
        found = getattr(importlib.import_module(home), name)
        change["made"] = found if change["arguments"] is None else found(**change["arguments"])
    if "feature" not in change:
        made = change["made"](value)
        return value if made is None else made
    features = change["made"].encode(value)
    changed, old = features.clone(), features[..., change["feature"]]
    changed[..., change["feature"]] = old * change["times"] if "times" in change else change["to"]
    return value + (change["made"].decode(changed) - change["made"].decode(features))
''',
}
"""What each kind of change does to one branch's rows."""

FUNCTIONS = {
    "patch": "patched",
    "mean": "averaged",
    "replace": "replaced",
    "zero": "zeroed",
    "noise": "noised",
    "corrupt": "corrupted",
    "scale": "scaled",
    "steer": "steered",
    "module": "through",
}
"""What these functions are called."""
