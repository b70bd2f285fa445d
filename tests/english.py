"""A page of English, written for these tests: no model has learnt it by heart."""

PAGE = """\
The ferry to the outer islands leaves at a quarter past six, before the bakery opens and while the harbour is still the
colour of slate. On most mornings there are five of us: the postman with his two grey sacks, a woman who mends nets and
has never once been late, a pair of students counting sea birds for a university in the south, and me. Nobody talks much
before the first island. The engine is loud, the coffee is bad, and the light comes up so slowly that you only notice it
when you can read the names painted on the fishing boats.

I began making the trip eleven years ago, when I was asked to repair the lighthouse on Kettle Rock. The lamp itself had
been replaced by a small electric one that needs no keeper, but the old lens was still there, a cage of glass as tall as
a door, and the council wanted it cleaned and turned again. I was told that the work would take a month. It took two
summers. Salt had eaten the bearings, and the mercury on which the whole apparatus once floated had been taken away in
the war. In the end we set it on a ring of steel balls, each about the size of a plum, and it turned so easily that a
child could move it with one finger.

People often ask why anybody should spend money on a light that no ship needs. I used to answer that it was beautiful,
which is true, but it is not the reason. The reason is that the islands are emptying. There were four hundred people on
the largest of them when my mother was born, and there are sixty now. The school closed, then the shop, then the chapel.
When a place loses things one after another, those who stay begin to think of it as a place where things end. A light
that is mended says the opposite. It does not bring back the school. But on the evening when we lit it, the whole island
came up the path with lanterns and cake, and three families who had been talking about leaving are still there today.

Last winter a storm broke two of the panes. I had kept the drawings, and the glazier in the town had kept the moulds, so
it was a matter of weeks. While I waited for the glass I slept in the keeper's room, listened to the wind, and wrote
down how everything is put together, step by step, with a list of the tools and the names of those who help. Somebody
else will have to do it one day, and I would like it to be easy for them.
"""

QUESTIONS = [
    "What is the capital of France?", "How many days are there in a week?", "What colour is the sky on a clear day?",
    "Who wrote Romeo and Juliet?", "What is two plus three?", "Name three fruits.", "What is water made of?",
    "What is the largest planet of the solar system?", "Write one sentence about the sea.", "What does a baker make?",
    "In which season do leaves fall?", "What is the opposite of hot?", "Which animal says meow?",
    "What is a bicycle?", "How do you say thank you in Spanish?", "Why do we sleep?",
    "What is the first month of the year?", "Give me a word that rhymes with cat.", "What is a square?",
    "Who was Albert Einstein?",
]  # fmt: skip


def chatml(question):
    """A question as SmolLM2 was trained to read it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
