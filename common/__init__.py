"""The training core: nothing in here knows any competition."""
