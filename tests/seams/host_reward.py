"""A reward on the host: how alike an answer's text and the right one are."""

import difflib


def similarity(question, texts, *, ignore_case=True):
  """Returns a number in [0, 1] for each of G answers to a question."""

  def normalise(text):
    text = text.strip()
    return text.lower() if ignore_case else text

  right = normalise(question.answer)
  return [
    difflib.SequenceMatcher(None, right, normalise(text)).ratio()
    for text in texts
  ]


similarity.on_host = True
