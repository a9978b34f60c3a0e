"""The tasks of EleutherAI's lm-eval on our models, through its own model interface.

Scores are comparable with published ones: prompts, cutting a prompt that is too long from the left, and reading an
answer are as in `lm_eval/models/huggingface.py` (lm-eval 0.4.13), with one exception: a text scored as a whole
(`loglikelihood_rolling`) has one BOS before it, where that file puts two before a Llama's.

Needs the extra `eval`: import it only where tasks are run.
"""

import os

# note: set before lm_eval is imported, which would fetch a script from the hub and run it for an unknown metric.
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["DISABLE_MULTIPROC"] = "1"  # its standard errors would fork a process that holds a model and its threads

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from custom_components.evaluation.chat_prompts import ChatPrompts
from custom_components.evaluation.scores import head_scores
from custom_components.generation.decoding import generate
from custom_components.generation.sampling import Sampling
from custom_components.models.attention import RowLengths
from custom_components.models.hidden_states import final_hidden_states
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform

# Its notes on tasks and on how it was called: nobody here can act on them.
logging.getLogger("lm_eval").setLevel(logging.ERROR)

_MAX_ANSWER_TOKENS = 256  # where a task sets no limit, as in huggingface.py, `max_gen_toks`
_NUM_BOOTSTRAPS = 1000  # resamplings for the standard error of metrics that have no formula for it


class LlamaLM(TemplateLM):
    """lm-eval's interface to a model.

    Prompts are the tasks' own text after one BOS, or with `apply_chat_template` dialogs in the prompt format.

    Args:
        batch_size: rows of one forward.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        tokenizer: ChatTransform,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._chats = ChatPrompts(tokenizer)
        self._batch_size = batch_size
        self._device = device

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos_id = self._tokenizer.bos_id
        return self._tokenizer.eos_id if bos_id is None else bos_id

    @property
    def max_length(self) -> int:
        return self._model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self._chats.format_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._tokenizer.prompt_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._chats.text(chat_history)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if (prompt := self._chats.ids(context)) is None:
            encoded: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return encoded
        return prompt, self._chats.ids_with_answer(context, continuation)[len(prompt) :]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if (prompt := self._chats.ids(string)) is not None:
            return prompt
        return self._tokenizer.encode(string, add_bos=add_special_tokens is not False, add_eos=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score each (name, context, continuation): the last's log-probability, and whether it is the greedy one."""
        rows = [self._scored_row(context, continuation) for _, context, continuation in requests]
        scores: list[tuple[float, bool]] = []
        for batch_rows in self._batches(rows, "scoring", disable_tqdm):
            log_probabilities_P, is_likeliest_P = self._position_scores(batch_rows)
            num_scored = [len(continuation) for _, continuation in batch_rows]
            for log_probabilities, is_likeliest in zip(
                log_probabilities_P.split(num_scored), is_likeliest_P.split(num_scored), strict=True
            ):
                scores.append((log_probabilities.sum().item(), bool(is_likeliest.all())))
        return scores

    @torch.no_grad()
    def _position_scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Score rows of ids, given those that their last positions have to predict: see :func:`head_scores`."""
        tokens = [token for inputs, _ in rows for token in inputs]
        positions = [position for inputs, _ in rows for position in range(len(inputs))]
        labels = []
        for inputs, targets in rows:
            labels += [CROSS_ENTROPY_IGNORE_IDX] * (len(inputs) - len(targets)) + targets
        lengths = RowLengths(tuple(len(inputs) for inputs, _ in rows)).to(self._device)
        hidden_1TD = final_hidden_states(self._model, self._tensor(tokens), lengths, self._tensor(positions))
        return head_scores(hidden_1TD, self._model.output, self._tensor(labels))

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor([values], device=self._device)

    def _scored_row(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids to feed, and those that the last positions have to predict."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"tasks: an answer of {len(continuation)} tokens cannot be scored in a context of {self.max_length}"
            )
        return [*context, *continuation][-(self.max_length + 1) : -1], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, num_windows = [], []
        for request in requests:
            [text] = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [("", *make_disjoint_window(pair)) for pair in pairs]
            num_windows.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        starts = [0, *num_windows[:-1]]
        return [sum(scores[start:end]) for start, end in zip(starts, num_windows, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        indices_by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            indices_by_settings.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for indices in indices_by_settings.values():
            settings = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), _MAX_ANSWER_TOKENS)
            # A task may say `until: null`.
            stop_texts = [text for text in handle_stop_sequences(settings["until"], eos=None) if text]
            if settings["do_sample"]:
                task = requests[indices[0]].task_name
                raise UserError(f"tasks: {task!r} samples its answers; only greedy answers are supported")

            def has_stop_text(ids: list[int], stop_texts: Sequence[str] = stop_texts) -> bool:
                text = self._tokenizer.decode(ids)
                return any(stop_text in text for stop_text in stop_texts)

            # A prompt keeps at least half of a short context.
            max_new_tokens = min(settings["max_gen_toks"], self.max_length // 2)
            indices = sorted(indices, key=lambda index: len(requests[index].args[0]))
            for batch in self._batches(indices, "answering", disable_tqdm):
                prompts = [self.tok_encode(requests[index].args[0]) for index in batch]
                ids = generate(
                    self._model,
                    [prompt[-(self.max_length - max_new_tokens) :] for prompt in prompts],
                    max_new_tokens=max_new_tokens,
                    stop_tokens=[self.eot_token_id, *self._tokenizer.stop_tokens],
                    sampling=Sampling(),
                    is_finished=has_stop_text,
                )
                for index, answer_ids in zip(batch, ids, strict=True):
                    text = self._tokenizer.decode(answer_ids)
                    answers[index] = postprocess_generated_text(text, stop_texts, think_end_token=None)
        return answers

    def _batches(self, items: Sequence[Any], what: str, disable_tqdm: bool) -> Iterator[Sequence[Any]]:
        with tqdm(total=len(items), desc=what, leave=False, delay=2, disable=disable_tqdm or None) as progress:
            for start in range(0, len(items), self._batch_size):
                batch = items[start : start + self._batch_size]
                yield batch
                progress.update(len(batch))


class LoadedTasks(TaskManager):
    """lm-eval's tasks, named or as YAML files, with their data: loaded once for several models.

    Raises:
        UserError: an unknown task, or one whose data cannot be fetched.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # Its own fourteen thousand tasks take ten seconds to index.
        super().__init__(include_defaults=not all(Path(name).is_file() for name in names))
        self.names = list(names)
        for name in self.names:
            if name not in self.task_index and not Path(name).is_file():
                raise UserError(
                    f"tasks: {name!r} is not a task of lm-eval or a YAML file; `lm-eval ls tasks` prints their names"
                )
        try:
            self._loaded = super().load(self.names)
        except Exception as error:  # noqa: BLE001 - a task's own code and the hub's client raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"tasks: {', '.join(self.names)} cannot be loaded ({reason})") from None

    def load(self, task_list: Any) -> Any:
        assert list(task_list) == self.names
        return self._loaded


def task_measures(
    tasks: LoadedTasks,
    model: LlamaLM,
    *,
    num_fewshot: int | None,
    max_rows: int | None,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, float]]:
    """Run every task; return its metrics, and their standard errors where there are any, by the task's name.

    Args:
        num_fewshot: solved questions before each; None: the task's own number.
        max_rows: questions of each task; None: all.
        apply_chat_template: questions, and those shown solved, are messages of a dialog.
    """
    results = simple_evaluate(
        model,
        tasks=tasks.names,
        task_manager=tasks,
        num_fewshot=num_fewshot,
        limit=max_rows,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=_NUM_BOOTSTRAPS,
        log_samples=False,
    )
    return {
        task: {
            _measure_name(key): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, values in results["results"].items()
    }


def _measure_name(key: str) -> str:
    """Shorten lm-eval's `acc,none` to `acc`, and write `exact_match,strict-match` as `exact_match (strict-match)`."""
    metric, _, filter_name = key.partition(",")
    return metric if filter_name == "none" else f"{metric} ({filter_name})"
