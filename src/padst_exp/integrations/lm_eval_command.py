"""`padst-lm-eval`: the command line of lm-evaluation-harness, which knows `--model padst`."""

import sys

from padst_exp.errors import UserError, require_installed


def main() -> None:
    """Register our model and hand over to the harness; our own mistakes are one line."""
    try:
        require_installed("lm_eval", "padst-lm-eval", "it", "lm-eval")
        from lm_eval.__main__ import cli_evaluate

        from padst_exp.integrations.lm_eval import register

        register()
        cli_evaluate()
    except UserError as error:
        sys.exit(f"padst_exp: error: {error}")


if __name__ == "__main__":
    main()
