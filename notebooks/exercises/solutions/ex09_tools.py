import train


def move_tool():
    def run(state, key, to):
        store = state.table("store")
        if key not in store:
            raise train.ToolError(f"there is no key {key!r}")
        if to in store:
            raise train.ToolError(f"{to!r} is taken")
        store[to] = store.pop(key)
        return {"moved": store[to]}

    arguments = train.schema(key="string: where the value is", to="string: where it shall be")
    return train.Tool("move_value", "Move a stored value to another key.", arguments, run, "store")


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "copies": ("store.pop(key)", "store[key]"),
    "no word for a missing key": ("if key not in store", "if False"),
    "overwrites": ("if to in store", "if False"),
    "an argument is optional": ("string: where it shall be", "string?: where it shall be"),
    "asks the user": ('run, "store")', 'run, "store", "ask")'),
    "says nothing": ('return {"moved": store[to]}', "return {}"),
}
