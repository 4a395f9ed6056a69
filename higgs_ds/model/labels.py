"""The value of labels without a target."""

IGNORE_INDEX = -100  # the ignore_index of torch's cross entropy
