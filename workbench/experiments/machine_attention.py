"""What standalone scripts change attention with, as text; the rest is in `workbench.experiments.machine`."""

ATTENTION = '''
class Attention:
    """Shows the calls of scaled dot product attention to what is hooked to the layer that computes."""

    def __init__(self):
        self.kernel = torch.nn.functional.scaled_dot_product_attention
        self.layer = None
        self.looks = {}

    def on(self, hooks, layer, look):
        """Let ``look(handed, rest)`` say what a layer's call puts out; ``rest()`` is what it would."""
        self.looks.setdefault(layer, []).append(look)
        hooks.callback(self.looks[layer].remove, look)
        enter = layer.register_forward_pre_hook(lambda *_: setattr(self, "layer", layer))
        leave = layer.register_forward_hook(lambda *_: setattr(self, "layer", None))
        hooks.callback(enter.remove)
        hooks.callback(leave.remove)

    def __call__(self, *values, **named):
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        return self.through(self.looks.get(self.layer, []), {**dict(zip(names, values)), **named})

    def through(self, looks, handed):
        if not looks:
            return self.kernel(**handed)
        return looks[0](handed, lambda **changed: self.through(looks[1:], {**handed, **changed}))


attention = torch.nn.functional.scaled_dot_product_attention = Attention()


def at_kernel(port, hooks, layer, look):
    """Let ``look`` see what a layer hands to attention: its query, key or value."""
    attention.on(hooks, layer, lambda handed, rest: rest(**{port: look(handed[port])}))


HOOKS |= {port: functools.partial(at_kernel, port) for port in ("query", "key", "value")}
'''

EDITING = '''
def edit(make, change, call, handed, rest):
    """Make a change of an attention layer's weights, if the call is one of its own."""
    if call not in change["calls"]:
        return rest()
    edited = make(change, call, handed, rest)
    if "strength" not in change and "mask" not in change:
        return edited
    plain = rest()
    changed = plain + change.get("strength", 1.0) * (edited - plain)
    if "mask" not in change:
        return changed
    image = slice(*change["image"])
    share = spread(change, edited[:, :, image], change["at"][0])
    plain[:, :, image] += share * (changed - plain)[:, :, image]
    return plain


HOOKS["kernel"] = attention.on
'''

EDIT_KINDS = {
    "reweight": '''
def reweighted(change, call, handed, rest):
    """Multiply the values of words: the same as their weights, since attention is linear in both."""
    value, made = handed["value"].clone(), rest()
    for index, count in change["calls"][call]:
        part = rows(value, index, count)
        for keys, factor in change["words"]:
            for head in change.get("heads", range(part.shape[1])):
                part[:, head, keys] *= factor
    made, image = made.clone(), slice(*change["image"])
    made[:, :, image] = rest(value=value)[:, :, image]
    return made


EDITS["reweight"] = functools.partial(edit, reweighted)
''',
    "inject": '''
def injected(change, call, handed, rest):
    """Take queries and keys, and so the weights, from the source; the values stay this run's own."""
    changed = {}
    for place in change["from"]:
        tensor = changed[place[1]] = handed[place[1]].clone()
        shared = tensor.shape[1] != handed["query"].shape[1]
        heads = slice(None) if shared else change.get("heads", slice(None))
        for number, (index, count) in enumerate(change["calls"][call]):
            part = rows(tensor, index, count)
            found = seen("source", place, change["given"][call][number]).expand_as(part).to(part)
            part[:, heads] = found[:, heads]
    return rest(**changed)


EDITS["inject"] = functools.partial(edit, injected)
''',
    "force_map": '''
def forced(change, call, handed, rest):
    """Give a word the weights that were said, and the other keys what is left, as they shared it."""
    query, value, image = handed["query"], handed["value"], slice(*change["image"])
    edited = rest().clone()
    wanted = resized(change["map"], change["shape"]).flatten()[:, None]
    mask = torch.zeros(query.shape[0], 1, 1, handed["key"].shape[2], dtype=query.dtype)
    for index, count in change["calls"][call]:
        rows(mask, index, count)[..., change["keys"]] = float("-inf")
    own = handed.get("attn_mask")
    if own is not None and own.dtype == torch.bool:
        mask = torch.where(own, mask, float("-inf"))
    elif own is not None:
        mask = (mask + own.float()).to(mask.dtype)
    others = rest(attn_mask=mask)
    for index, count in change["calls"][call]:
        width = query.shape[0] // count
        for row in range(index * width, (index + 1) * width):
            for head in [head % query.shape[1] for head in change.get("heads", range(query.shape[1]))]:
                words = value[row, head * value.shape[1] // query.shape[1], change["keys"]].mean(0)
                left = others[row, head, image] * (1 - wanted)
                edited[row, head, image] = (left + wanted * words).to(edited.dtype)
    return edited


EDITS["force_map"] = functools.partial(edit, forced)
''',
}
"""What each kind of edit does to an attention layer."""
