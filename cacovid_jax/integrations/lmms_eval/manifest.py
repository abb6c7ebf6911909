"""What lmms-eval finds by our entry point, before it knows which model to load.

Every start of lmms-eval imports this file, whatever the model, and a fault here
would hide other plug-ins: so it imports nothing of ours.
"""

MODEL = "cacovid_jax"
_CLASSES = "cacovid_jax.integrations.lmms_eval.model"


def manifest():
  """Returns the `ModelManifest` of chats and, for --force_simple, of texts."""
  from lmms_eval.models import registry_v2

  return registry_v2.ModelManifest(
    model_id=MODEL,
    simple_class_path=f"{_CLASSES}.Simple",
    chat_class_path=f"{_CLASSES}.Chat",
  )
