"""Answers that extraction rules read differently, and how each one reads them.

Columns are the rules of `RULES`, in order; "-" is no option, "?" a guess. Those
of `lmms-0.7.3` were written down from what lmms-eval 0.7.3 says, those of
`paper` by hand. `ANSWERS` is the list of texts alone.
"""

# The options of the question that is answered, for rules that look for them.
OPTIONS = (
  "a red coat",
  "a green door",
  "blue paint",
  "nobody",
  "E.T. the puppet",
)

RULES = (
  (("videomme", "paper"),),
  (("videomme", "lmms-0.7.3"), ("mlvu_dev", "lmms-0.7.3")),
  (("mlvu_dev", "paper"),),
  (("mlvu_test", "paper"),),
  (("mlvu_test", "lmms-0.7.3"),),
  (("longvideobench", "paper"), ("longvideobench", "lmms-0.7.3")),
  (("mvbench", "paper"), ("mvbench", "lmms-0.7.3")),
  (("egoschema", "paper"), ("egoschema", "lmms-0.7.3")),
  (("nextqa", "paper"), ("nextqa", "lmms-0.7.3")),
)

_TABLE = (
  ("", "- - - - - ? - ? ?"),
  ("B", "B B B B B B B B B"),
  ("b", "- - - - - ? B ? ?"),
  ("B.", "B B - - B B B B B"),
  ("B)", "B B B B B B B ? ?"),
  ("(B)", "B B B B B B B B B"),
  ("(B) a green door", "B B B B B B B B B"),
  ("B. a green door", "B B - - B B B B B"),
  ("B: a green door", "B B - - B B B ? ?"),
  ("B a green door", "B B - - B B B B B"),
  ("**B**", "B B - - B B B ? ?"),
  ('"B"', "B B - - B B B ? ?"),
  ("'C'", "C C - - C C C C C"),
  (",B", "B B - - B B B B B"),
  ("E", "- - - E E E E E E"),
  ("F", "- - - F F ? - ? ?"),
  ("(E)", "- - - E E E E E E"),
  ("E. E.T. the puppet", "- - - - E E E E E"),
  ("Answer: B", "A B - - B A B B B"),
  ("answer: b", "- - - - - ? B ? ?"),
  ("The answer is B", "B B - - B B B B B"),
  ("The answer is: (C).", "C C C C C C C C C"),
  ("The best answer is C. Apple", "C A - - A C C C C"),
  ("The correct option is D.", "D D - - D D D D D"),
  ("Best option: D", "B D - - D D D D D"),
  ("I choose B, not D", "B D - - D B B D D"),
  ("A or B", "A A - - A A A A B"),
  ("(A) or (B)", "A B A A B A A A B"),
  ("(A) or (B) or (A)", "A A A A A A A B A"),
  ("A. or C.", "A A - - A A A A C"),
  ("A) no, B) yes", "A A A A A A A ? ?"),
  ("C, because D is worse", "C C - - C C C D D"),
  ("It is a door", "- - - - - ? A ? ?"),
  ("a", "- - - - - ? A ? ?"),
  ("none of these", "- - - - - ? - ? ?"),
  ("Nobody", "- - - - - ? - ? ?"),
  ("I believe that it shows a green door", "- - - - - ? A ? B"),
  ("we see blue paint and then a red coat", "- - - - - ? A ? A"),
  (
    "nothing here fits any of the given ones, so nothing can be said",
    "- - - - - ? - ? ?",
  ),
  ("Because the man takes it", "B B - - B B - ? ?"),
  ("Definitely", "D D - - D D - ? ?"),
  ("<answer>D</answer>", "D D - - D D D ? ?"),
  ("\\boxed{C}", "C C - - C C C ? ?"),
  ("the option\nB", "B B - - B B B B B"),
  ("A.\nB", "A A - - A A A A B"),
  ("B/C", "B B - - B B B C C"),
  ("1,000 coats (C)", "C C C C C C C C C"),
  ("USA is the place", "A A - - A A - A A"),
  ("答案是C", "C C - - C C - C C"),
  ("I think the answer is (C), not D because", "C D C C D C C C C"),
)

ANSWERS = tuple(text for text, _ in _TABLE)

# (benchmark, rule) -> what each of `ANSWERS` is read as.
EXPECTED = {
  name: tuple(letters.split()[column] for _, letters in _TABLE)
  for column, names in enumerate(RULES)
  for name in names
}
