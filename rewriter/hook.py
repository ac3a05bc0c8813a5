"""Interim import hook."""


def install(select, assign_index, cache):
    return None


def uninstall():
    return None


def rewrite_module_code(code, assign_index):
    return code


def rewrite_loaded_module(module, assign_index):
    return None


def restore_module(module):
    return None
