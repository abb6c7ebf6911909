"""The model as lmms-eval 0.7 calls it; needs the extra `[lmms]`.

`arguments.ARGUMENTS` lists what `--model_args` takes.
"""

from lmms_eval.api import instance as instance_lib
from lmms_eval.api import model as model_lib

from cacovid_jax import errors
from cacovid_jax.integrations.lmms_eval import answerer as answerer_lib
from cacovid_jax.integrations.lmms_eval import arguments
from cacovid_jax.integrations.lmms_eval import requests as requests_lib


class Loss(tuple, instance_lib.GenerationResult):
  """(float, bool): loss of a continuation, and whether it is the greedy answer.

  The loss is the mean negative log-probability of tokens. lmms-eval 0.7.3 makes
  text of every pair but a result of this type, whose `text` it takes as it is.
  """

  def __new__(cls, loss: float, greedy: bool):
    return super().__new__(cls, (loss, greedy))

  def __init__(self, loss: float, greedy: bool):
    instance_lib.GenerationResult.__init__(self, text=(loss, greedy))


class Simple(model_lib.lmms):
  """Requests that are a text and what is to be looked at."""

  is_simple = True

  def __init__(self, **kwargs):
    """Loads the weights; see `arguments.parse`."""
    super().__init__()
    self._answerer = answerer_lib.RequestAnswerer(arguments.parse(**kwargs))

  def generate_until(self, requests) -> list[instance_lib.GenerationResult]:
    """Returns the answers to a list of `Instance`, in order."""
    read = [self._read(*request.args) for request in requests]
    replies = self._answerer.generate(*zip(*read, strict=True)) if read else []
    result, counts = instance_lib.GenerationResult, instance_lib.TokenCounts
    return [
      result(
        text=one.text,
        token_counts=counts(
          input_tokens=one.input_tokens, output_tokens=one.output_tokens
        ),
      )
      for one in replies
    ]

  def loglikelihood(self, requests) -> list[Loss]:
    """Returns how badly each continuation follows its prompt, in order."""
    read = [self._read_continuation(request) for request in requests]
    if not read:
      return []
    found = self._answerer.likelihoods(*zip(*read, strict=True))
    means = [-one.log_prob / max(one.num_tokens, 1) for one in found]
    return [Loss(x, one.greedy) for x, one in zip(means, found, strict=True)]

  def generate_until_multi_round(self, requests):
    """Refuses: a clip is compressed for one question."""
    raise errors.UserError(
      f"{requests[0].task_name}: a task of several rounds; cacovid_jax answers"
      " one question about one clip, so take a task of such questions"
    )

  def _read(self, context, gen_kwargs, doc_to_visual, *row):
    """Returns (`requests.Asked`, longest answer) of a request's arguments."""
    place, doc, name = self._row(*row)
    asked = requests_lib.from_simple(context, doc_to_visual(doc), place, name)
    return asked, self._length(gen_kwargs, place)

  def _read_continuation(self, request):
    """Returns (`requests.Asked`, continuation) of a request."""
    if len(request.args) < 6:
      raise errors.UserError(
        f"{request.task_name}: asks for a text's likelihood without a clip,"
        " which cacovid_jax does not know; take another metric"
      )
    context, target, doc_to_visual, *row = request.args
    place, doc, name = self._row(*row)
    asked = requests_lib.from_simple(context, doc_to_visual(doc), place, name)
    return asked, str(target(doc) if callable(target) else target)

  def _row(self, doc_id, task, split):
    """Returns (place, row, its identity)."""
    doc = self.task_dict[task][split][doc_id]
    name = requests_lib.identity(doc, task, doc_id)
    return f"{task}/{split}/{doc_id}", doc, name

  def _length(self, gen_kwargs, place) -> int:
    default = self._answerer.experiment.config.evals.max_new_tokens
    return requests_lib.max_new_tokens(gen_kwargs, default, place)


class Chat(Simple):
  """Requests that are conversations; the same words reach the model."""

  is_simple = False

  def _read(self, context, doc_to_messages, gen_kwargs, *row):
    place, doc, name = self._row(*row)
    asked = requests_lib.from_chat(doc_to_messages(doc), place, name)
    return asked, self._length(gen_kwargs, place)
