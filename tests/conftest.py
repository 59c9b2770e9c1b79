"""The hypothesis profile of every run: the same examples each time, and no time limit on a shared machine."""

from hypothesis import settings

settings.register_profile("lwm", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("lwm")
