"""Exercise 09: a tool of your own."""


def move_tool():
    """A `train.Tool` named move_value, permission "allow", that moves a value from one key to another.

    Values are in `state.table("store")`, a dictionary. Its two arguments, both strings and both required,
    are `key` and `to`; it returns {"moved": the value}. There are two ways to fail, both by `train.ToolError`
    and without any change: no such key, and a `to` that is taken already.
    """
    raise NotImplementedError
