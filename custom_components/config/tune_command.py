"""The command line of `tune`, changed before torchtune reads it: which recipe and config are meant, `ls`, `cp`.

Imported by llama_lora_recipes.pth at the start of every `tune`. torchtune runs a recipe of ours as a module, so that
`./recipes/x.py`, an absolute path and another working directory all end in a traceback. Here the folder to import from
is put on the path and the recipe's path is written relative to it. What is torchtune's own is left as it is.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import custom_components
from custom_components.config.recipe_files import (
    HELP_FLAGS,
    Project,
    config_named_in,
    docstring,
    find_recipe,
    import_root,
    torchtune_names,
)
from custom_components.runtime import tune_startup  # noqa: F401 - it has to take effect before torch is imported
from custom_components.runtime.errors import EXIT_CODE_USER_ERROR, UserError, print_errors
from custom_components.runtime.launched import prepare_launcher
from custom_components.runtime.starting import start_command
from custom_components.runtime.terminal import say


@dataclass(frozen=True)
class Run:
    """A recipe to run.

    Attributes:
        root: the folder to import it from; None: the recipe is torchtune's own, or not to be told from the options.
        arguments: of `tune run`, the recipe's path relative to the root.
        launch_options: those of torchrun, which precede the recipe and start it in other processes.
    """

    root: Path | None
    arguments: list[str]
    launch_options: Sequence[str] = ()


def start() -> None:
    """Put sys.argv and sys.path right for the command that was typed, or carry it out and exit."""
    # note: in a virtual environment Python executes every .pth file twice; the .pth file asks for this attribute,
    # which outlives the modules that `import_from` forgets.
    sys.tune_command_was_read = True  # type: ignore[attr-defined]
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    project = Project.around(Path.cwd())
    try:
        if command == "run":
            run = run_of(arguments, project)
            sys.argv[2:] = run.arguments
            if run.root is not None:
                import_from(run.root)
                start_command()
                if run.launch_options:
                    prepare_launcher(run.launch_options)
        elif command in ("cat", "validate"):
            sys.argv[2:] = [project.config_path(argument) for argument in arguments]
        elif command == "cp":
            copy(arguments, project)
        elif command == "ls":
            print(f"{project.listing()}\n\nof torchtune:", flush=True)
    except UserError as error:
        print_errors(error)
        leave(EXIT_CODE_USER_ERROR)


def run_of(arguments: Sequence[str], project: Project) -> Run:
    """Find the recipe and arguments of a `tune run`. `--help` is printed here if that needs no import.

    Raises:
        UserError: no such recipe, or no config.
    """
    index = _recipe_index(arguments)
    if index is None or arguments[index] in torchtune_names():
        return Run(None, list(arguments))
    recipe = find_recipe(arguments[index], project)
    root, module_path = import_root(recipe)
    options = list(arguments[index + 1 :])
    config = _config_option(options)
    if any(flag in options for flag in HELP_FLAGS):
        show_help(recipe, config, project)
        config = config or "none"  # torchtune insists on one; what follows is for the recipe to show
    elif config is None:
        example = config_named_in(docstring(recipe)) or "FILE"
        raise UserError(f"--config is missing: tune run {arguments[index]} --config {example}")
    if recipe.stem == "estimate" and list(arguments[:index:2]) == ["--nproc_per_node"]:
        # It speaks of several devices, in one process.
        options.append(f"nproc_per_node={arguments[1]}")
        arguments, index = arguments[index:], 0
    command = [*arguments[:index], module_path, "--config", project.config_path(config), *options]
    return Run(root, command, tuple(arguments[:index]))


def import_from(root: Path) -> None:
    """Let the recipe and the processes it may start import from `root` first, its own components included."""
    sys.path.insert(0, str(root))
    if root != Path.cwd():
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{others}" if others else str(root)
    components = root / "custom_components/__init__.py"
    if components.is_file() and not components.samefile(custom_components.__file__):
        for name in [name for name in sys.modules if name.partition(".")[0] == "custom_components"]:
            del sys.modules[name]


def show_help(recipe: Path, config: str | None, project: Project) -> None:
    """Print the recipe's keys and exit; return where only the recipe itself knows them."""
    from custom_components.config.recipe_help import recipe_help, settings_type_of

    settings_type = settings_type_of(recipe)
    if settings_type is None:
        return
    print(
        recipe_help(
            docstring(recipe), settings_type, project.existing_config(config or config_named_in(docstring(recipe)))
        )
    )
    leave(0)


def copy(arguments: Sequence[str], project: Project) -> None:
    """Copy a recipe or config of the project and exit; return where the name is not one of them.

    Unlike torchtune's `tune cp`, nothing is overwritten.
    """
    parser = argparse.ArgumentParser("tune cp", add_help=False, exit_on_error=False)
    parser.add_argument("name")
    parser.add_argument("destination")
    parser.add_argument("-n", "--no-clobber", action="store_true")
    parser.add_argument("--make-parents", action="store_true")
    try:
        options, unknown = parser.parse_known_args(arguments)
    except (argparse.ArgumentError, SystemExit):
        return
    source = project.named(options.name)
    if source is None or unknown:
        return
    if not options.destination.strip():
        raise UserError(f"tune cp: the destination {options.destination!r} is empty: a shell variable may be unset")
    destination = Path(options.destination)
    if destination.is_dir() or options.destination.endswith("/"):
        destination = destination / source.name
    elif destination.suffix != source.suffix:
        destination = destination.with_name(destination.name + source.suffix)
    try:
        if options.make_parents:
            destination.parent.mkdir(parents=True, exist_ok=True)
        if not destination.parent.is_dir():
            raise UserError(f"{destination.parent}: no such directory; --make-parents makes it")
        with destination.open("xb") as file:  # note: "x" goes through no link, a dangling one included
            file.write(source.read_bytes())
        say(f"copied to {destination}")
    except OSError as error:
        if error.errno != errno.EEXIST or not os.path.lexists(destination):
            raise UserError(f"{destination} cannot be written ({error.strerror}); copy to another name") from None
        if not options.no_clobber:
            raise UserError(f"{destination} is there already; copy to another name") from None
        say(f"{destination} is there already: not copied")
    leave(0)


def leave(exit_code: int) -> NoReturn:
    """Exit from a .pth file, where SystemExit would be a fatal error of Python's start."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _recipe_index(arguments: Sequence[str]) -> int | None:
    """Find which argument is the recipe: the first, unless options of torchrun precede it; None: it is unclear."""
    if arguments and not arguments[0].startswith("-"):
        return 0
    return next((index for index, argument in enumerate(arguments) if argument.endswith(".py")), None)


def _config_option(options: list[str]) -> str | None:
    """Take `--config FILE` or `--config=FILE` out of the options; the last one counts.

    Raises:
        UserError: `--config` with nothing after it.
    """
    values = []
    for index in reversed(range(len(options))):
        if options[index] == "--config":
            values += options[index + 1 : index + 2] or [""]
            del options[index : index + 2]
        elif options[index].startswith("--config="):
            values.append(options.pop(index).removeprefix("--config="))
    if values and (not values[0] or "=" in values[0] and not Path(values[0]).exists()):
        raise UserError("--config: name a file after it, as in --config configs/tiny_qlora.yaml")
    return values[0] if values else None
