"""The mistakes of `make mutants` in commands and flags: what is refused, and what a refusal says."""

from mutant import Mutant

CLI, FLAGS = (f"lumina/test_{name}.py::test" for name in ("cli", "flags"))
RECIPE = "lumina/data/test_recipe.py::test"

COMMANDS = [
    # ----------------------------------------------------------------------------------------------------- commands and flags
    Mutant(
        "a flag is not suggested",
        "lumina/arguments.py",
        'return nearest(_name(word), self._option_string_actions) if is_flag else ""',
        'return ""',
        f"{CLI}_a_refusal_names_the_nearest_name_and_the_help_of_its_own_command",
    ),
    Mutant(
        "a misspelt flag that is required is told as missing",
        "lumina/arguments.py",
        "                    self.refuse(word)",
        "                    pass",
        f"{CLI}_a_refusal_names_the_nearest_name_and_the_help_of_its_own_command",
    ),
    Mutant(
        "the help of the outermost command is named",
        "lumina/cli.py",
        "known.parser.refuse(",
        "parser.refuse(",
        f"{CLI}_a_refusal_names_the_nearest_name_and_the_help_of_its_own_command",
    ),
    Mutant(
        "a choice is not suggested",
        "lumina/arguments.py",
        "{', '.join(choices)}{nearest(value, choices)}",
        "{', '.join(choices)}",
        f"{CLI}_a_refusal_names_the_nearest_name_and_the_help_of_its_own_command",
    ),
    Mutant(
        "a trainer's misspelt flag is taken for a field",
        "lumina/flags.py",
        "        parser.refuse(word)",
        "        pass",
        f"{FLAGS}_a_misspelt_flag_is_refused_with_the_nearest_one_and_where_all_are",
    ),
    Mutant(
        "lumina runs DIR only with the word list",
        "lumina/cli.py",
        "arguments = spelled(arguments, add(runs))",
        "add(runs)",
        "lumina/runs/test_library.py::test_a_directory_of_runs_is_listed_without_the_word_list",
    ),
    Mutant(
        "the flag that works is not told",
        "lumina/validation.py",
        "{t.steps // 10}",
        "{t.steps}",
        f"{FLAGS}_a_run_shorter_than_its_warmup_is_refused_with_the_flag_that_works",
    ),
    Mutant(
        "a command of data is loaded for its help",
        "lumina/data/commands.py",
        "        getattr(options, arguments[0])(parsers[arguments[0]])",
        "        getattr(options, arguments[0])(parsers[arguments[0]])\n"
        "        importlib.import_module(f'lumina.data.{ACTIONS[arguments[0]][0]}')",
        f"{CLI}_help_and_counting_import_nothing_heavy",
    ),
    # ---------------------------------------------------------------------------------------------------------------- recipes
    Mutant(
        "an option of a step that is not taken is passed over",
        "lumina/data/recipe.py",
        "if step and step not in recipe.named_steps:",
        "if False:",
        f"{RECIPE}_an_option_of_a_step_that_is_not_taken_is_refused_with_the_steps_that_take_it",
    ),
    Mutant(
        "an option's default is taken for one that was given",
        "lumina/data/recipe.py",
        "default = type(spec.default), argparse.SUPPRESS",
        "default = type(spec.default), spec.default",
        f"{RECIPE}_an_option_of_a_step_that_is_not_taken_is_refused_with_the_steps_that_take_it",
    ),
    Mutant(
        "a step's options are looked at when it begins",
        "lumina/data/recipe.py",
        "    require_options(recipe)",
        "    pass",
        f"{RECIPE}_a_value_that_is_none_is_refused_before_anything_is_read_or_made",
    ),
    Mutant(
        "options of steps that are not taken decide something",
        "lumina/data/recipe.py",
        'if _step_of(name) in ("", *self.named_steps)}',
        "if True}",
        f"{RECIPE}_a_manifest_has_the_options_of_the_steps_that_were_taken_alone",
    ),
]
