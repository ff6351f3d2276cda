"""The completion that a data set gives beside each prompt: an assistant turn, or a column.

Columns are read as trainers read them: the assistant turn that follows the prompt of a conversation; `completion`
beside `prompt`, `response`, `output` and `answer` likewise; and of a preference pair the chosen answer without what it
has in common with the rejected one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fisher_vmap.data.conversations import Message, SkippedPrompt, answer_after, last_answer, user_turns
from fisher_vmap.data.formats import CONVERSATION_COLUMNS, Form, Row, cell, check_column
from fisher_vmap.errors import UserError, listed

# Columns that are looked for, in this order, if the prompt is not a conversation.
COMPLETION_COLUMNS = ("completion", "response", "output", "answer", "chosen")


class Answers:
    """Where the completions of a table are.

    Attributes:
        columns: the names of the columns that are read.
        words: where they come from, for the log.
    """

    def __init__(
        self,
        table: str,
        columns: Sequence[str],
        form: Form,
        completion_column: str | None,
        conversation: Literal["first_turn", "full"],
    ) -> None:
        """Choose the column.

        Raises:
            UserError: there is no such column, or none is known for completions.
        """
        self._form, self._conversation, self._column = form, conversation, completion_column
        if completion_column is not None:
            check_column(table, columns, completion_column, "completion_column")
        elif not any(name in CONVERSATION_COLUMNS for name in form.columns):
            self._column = next((name for name in COMPLETION_COLUMNS if name in columns), None)
            if self._column is None:
                raise UserError(
                    f"{table}: targets is completion, but no column is named {', '.join(COMPLETION_COLUMNS)}, and the "
                    f"prompts are no conversations; set completion_column to one of: {listed(columns, 20)}"
                )
        self.columns = () if self._column is None else (self._column,)
        self.words = "the assistant turn after each prompt" if self._column is None else f"column {self._column!r}"

    def of(self, row: Row) -> str | Message:
        """The completion of a row: a text, or an assistant's message.

        Raises:
            SkippedPrompt: the row has none, or one that does not follow the prompt.
        """
        prompt = self._form.prompt(row)
        if self._column is None:
            return answer_after(prompt, self._conversation)
        value: Any = cell(row, self._column)
        if value is None:
            raise SkippedPrompt(f"column {self._column!r} is null")
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            if self._column == "chosen" and "rejected" in self._form.columns:  # the prompt is what both begin with
                value = value.removeprefix(prompt) if isinstance(prompt, str) else value
            if not value.strip():
                raise SkippedPrompt(f"column {self._column!r} holds no completion")
            return self._of_whole_prompt(prompt, str(value))
        one = isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str)
        turns = [value] if one else value
        if user_turns(turns):  # the conversation with its answers
            return answer_after(turns, "first_turn" if isinstance(prompt, str) else self._conversation)
        return self._of_whole_prompt(prompt, last_answer(turns))

    def _of_whole_prompt(self, prompt: object, answer: str | Message) -> str | Message:
        """An answer to all turns of a prompt; of these `conversation: first_turn` takes the first."""
        if self._conversation == "first_turn" and user_turns(prompt) > 1:
            raise SkippedPrompt(
                f"column {self._column!r} answers the last turn, and conversation: first_turn takes the first; set "
                "conversation to full"
            )
        return answer
