"""Teaches a promoted model what a person writes down: a lesson of questions and answers, conversations or plain text.

A lesson is a folder ``lessons/<model>/<n>/`` of the store (:mod:`nanochat_core.lessons`). A program that asks for a
lesson, such as ``jobs.teach``, writes this folder; the lesson then waits in the queue of its model. :mod:`session`
gives the queued lessons to the model, one after another. Each lesson has these parts:

1. :mod:`nanochat_core.lessons.items` reads and checks what the person wrote. :mod:`wordings` makes further wordings of
   each question from templates. Some of the wordings are held out.
2. :mod:`memory` samples conversations from which the model learned earlier, so that the model does not forget them. In
   these conversations and in earlier lessons, it finds the answers that the lesson contradicts. For a model whose
   fine-tuning is not known, :mod:`rehearsal` lets the model write these conversations itself.
3. :mod:`training` trains on the lesson and on these conversations until the model also answers the held-out wordings,
   for at most a given number of steps.
4. :mod:`examination` asks the model questions before and after the training. Some of them come from :mod:`neighbors`:
   the lesson's questions with other arguments, such as other numbers.
5. The promotion gate compares the results of the two examinations, and promotes the taught model or refuses the lesson.

Every part can be repeated. If a process dies, the promoted model is either the earlier model or the taught one. If the
lesson is then given again on the same machine with the same number of threads, the training ends with the same weights.
"""
