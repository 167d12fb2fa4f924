"""What models write, read as a ranking: every usual form, and nothing without proof."""

from __future__ import annotations

import json
import time

import pytest

from mm_retriever.rerank.answers import LONGEST_ANSWER, named_labels, read_answer, reasons_by_label, repair


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('{"ranking": [3, 1, 2]}', "3 1 2"),
        (
            'Sure!\n```json\n{"caption": "2 mugs", "ranking": [3, 1, 2], "reason": "1 of 2"}\n```\nHope that helps: 1',
            "3 1 2",
        ),
        ('{"ranking": ["3", "candidate 1", {"number": 2, "why": "4"}]}', "3 1 2"),
        ('{"Ranked List": "3, 1, 2"}', "3 1 2"),
        ('{"ranking": [3, 1.0, 2.5, -1, true, null, "x", 1e400]}', "3 1 a number -1 a number"),
        ('{"caption": "two", "best": [3, 1, 2]}', "3 1 2"),
        ('{"caption": "4 mugs", "wanted": "5 mugs", "ranking": [3, 1, 2', "3 1 2"),
        ("Ranked list: [3, 1, 2]\nReasons: 3 is best.", "3 1 2"),
        ("At first [1, 2, 3], but then [3, 1, 2], see [a] and []", "3 1 2"),
        ("3 > 1 > 2", "3 1 2"),
        ("3,1,2", "3 1 2"),
        ("1. Candidate 3\n2. Candidate 1\n3. Candidate 2", "3 1 2"),
        ("1) 3\n2) 1\n- 2", "3 1 2"),
        ("The best is 3, then 1, and last 2.", "3 1 2"),
        ("03, #1, (2)", "3 1 2"),
        ("version 2.5 of mug7 costs -4 or 0x10", ""),
        ("[-1, 0, 12, 2.5]", "-1 0 12 2.5"),
        ("", ""),
        ("I cannot rank pictures.", ""),
        ("{" * 9999, ""),
        ('{"a":' * 9999, ""),
        ("[" * 9999 + "]" * 9999, ""),
        ('{"ranking": ' + "[" * 9999, ""),
        ('{"ranking": ' + "9" * 9999 + "}", ""),
        ("9" * 9999, ""),
        ("\u0663, \u0661", "3 1"),
        ('{"ranking": {"first": 3}}', ""),
        ('{"ranking": [' + '{"a":' * 600 + "1" + "}" * 600 + "]}", ""),
    ],
)
def test_the_ranking_is_found_in_what_models_write(text: str, numbers: str) -> None:
    """Truth: by hand; JSON first, else the strongest form in the text."""
    assert " ".join(read_answer(text).ranking) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[3] > [1] > [2]", "3 1 2"),  # RankGPT's form
        ("[2] < [1] < [3]", "3 1 2"),
        ("Image 3 > Image 1 > Image 2", "3 1 2"),
        ("[3] = [1] > [2]", "3 1 2"),
        ("Candidate 3 > Candidate 1 == Candidate 2 > Candidate 4", "3 1 2 4"),
        ("[2] < [1] = [3]", "3 1 2"),
        ("Image 3 = 2 > Image 1 = 1", ""),
        ("Image 3 = Image 1", ""),
        ("Order: 3 -> 1 -> 2", "3 1 2"),
        ("Final answer: [2] > [3] > [1]\n\nBecause [2] > [3] in colour.", "2 3 1"),
        ("[3] [1] [2]", "3 1 2"),
        ("3, 1, 2\nReasons: [1] it is red", "3 1 2"),
        ("**Ranking:** 3, 1, 2", "3 1 2"),
        ("Ranking of the 3 images: 2, 1, 3", "2 1 3"),
        ("The order is: 2, 3 and 1", "2 3 1"),
        ("Ranking (worst to best): 2, 1, 3", "3 1 2"),
        ("3\n1\n2", "3 1 2"),
        ("```\n3 > 1 > 2\n```", "3 1 2"),
        ("**1. Image 4**\n**2. Image 1** - red, 3 hearts", "4 1"),
        ("3. Image 1\n1. Image 2\n2. Image 3", "2 3 1"),
        ("1st: Image 3\n2nd: Image 1", "3 1"),
        ("| Rank | Image |\n|---|---|\n| 1 | 3 |\n| 2 | Image 1 |", "3 1"),
        ("| Image | Score |\n|---|---|\n| 1 | 0.3 |\n| 2 | 0.8 |", "2 1"),
        ("Image 1: 7/10\nImage 2: 9/10", "2 1"),
        ("Image 3 is best, then 1", "3 1"),
        ("The best of the 3 images is 2.", "2"),
        ("<think>first 1, 2, 3? [1, 2, 3]</think>\n[3, 1, 2]", "3 1 2"),
        ("it may be [1, 2]</think>Ranking: 2, 1", "2 1"),
        ('[{"index": 1, "rank": 2, "score": 0.3}, {"index": 3, "rank": 1, "score": 0.1}]', "3 1"),
        ('{"ranking": [{"rank": "2nd", "candidate": "Image 2"}, {"rank": "1st", "candidate": "Image 1"}]}', "1 2"),
        ('{"ranking": [{"score": 0.5, "candidate": 1}, {"score": "0.9", "candidate": 2}]}', "2 1"),
        ('{"ranking": [{"image": 3, "year": 2019}, {"year": 2020, "image": 1}]}', "3 1"),
        ('{"1": 0.2, "2": 0.9, "3": 0.5}', "2 3 1"),
        ('{"scores": {"1": 1, "2": 3, "3": 2}}', "2 3 1"),
        ('{"ranking": {"Image 2": 1, "Image 1": 2}}', "2 1"),
        ('{"ranking": {"1": "Image 2", "2": "Image 1"}}', "2 1"),
        ('{"answer": {"ranking": [2, 1]}}', "2 1"),
        ('["Image 2", "Image 1"]', "2 1"),
        ('{"ranking": "[3] > [1] > [2]"}', "3 1 2"),
    ],
)
def test_every_usual_form_of_a_ranking_is_read(text: str, numbers: str) -> None:
    """Truth: by hand; ranks and scores order objects, names and lists order themselves."""
    assert " ".join(read_answer(text).ranking) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[3] (best) > [1] (ok) > [2] > [4]", "3 1 2 4"),
        ("[3] red mug > [1] blue mug > [2] cup", "3 1 2"),
        ("Candidate 3 (red) > Candidate 1 = Candidate 2", "3 1 2"),
        ("3 (0.9) > 1 (0.5) > 2 (0.1)", "3 1 2"),
        ("[3] ~ [1] > [2]", "3 1 2"),
        ("[3] > [1] > [2] because 5 > 3", "3 1 2"),
        ("Rank | Candidate\n1 | 3\n2 | 1\n3 | 2", "3 1 2"),
        ("Candidate | Score\n1 | 5\n2 | 2\n3 | 9", "3 1 2"),
        ("rank\tcandidate\n1\t3\n2\t1\n3\t2", "3 1 2"),
        ("Rank,Candidate\n1,3\n2,1\n3,2", "3 1 2"),
        ("Rank  Image\n1     3\n2     1\n3     2", "3 1 2"),
        ("1) 3 2) 1 3) 2", "3 1 2"),
        ("(1) Candidate 3 (2) Candidate 1 (3) Candidate 2", "3 1 2"),
        ("1. [3], 2. [1], 3. [2]", "3 1 2"),
        ("1st: Image 3; 2nd: Image 1; 3rd: Image 2", "3 1 2"),
        ("#1 Candidate 3\n#2 Candidate 1\n#3 Candidate 2", "3 1 2"),
        ("1. 3 (red)\n2. 1 - blue\n3. 2", "3 1 2"),
        ("1. Red mug [3]\n2. The cup (Image 1)\n3. Hat (2)", "3 1 2"),
        ("Best: 3\nSecond: 1\nThird: 2", "3 1 2"),
        ("Best: Candidate 3\nSecond best: Candidate 1\nWorst: Candidate 2", "3 1 2"),
        ("3, 1, 2 (from best to worst)", "3 1 2"),
        ("2, 1, 3 (worst to best)", "3 1 2"),
        ("Ranking: 3 (0.9), 1 (0.7), 2 (0.5)", "3 1 2"),
        ("Ranking: 3, 1, and finally 2", "3 1 2"),
        ("Worst → Best: 2, 1, 3", "3 1 2"),
        (
            "1. Image 1: 3 hearts\n2. Image 2: blue\n3. Image 3\nRanking:\n1. Image 3\n2. Image 1\n3. Image 2",
            "3 1 2",
        ),
        ("1. Image 1: 3 hearts\n2. Image 2: blue\n3. Image 3: a hat\n3, 1, 2", "3 1 2"),
        ("- Image 1: red\n- Image 2: blue\n- Image 3: hat\nRanking:\n1. Image 3\n2. Image 1\n3. Image 2", "3 1 2"),
        ("3，1，2", "3 1 2"),
        ("Ranking：[3]＞[1]＞[2]", "3 1 2"),
        ("The answer is \\boxed{3, 1, 2}", "3 1 2"),
        ("<answer>3, 1, 2</answer>", "3 1 2"),
        ("4 > 2\n2 > 1\nRanking: 3, 1, 2", "3 1 2"),
        ('{"ranking": ["3 - red", "1 - blue", "2"]}', "3 1 2"),
        ('{"ranking": ["red mug (3)", "blue mug (1)", "2"]}', "3 1 2"),
        ('{"finalRanking": [3, 1, 2]}', "3 1 2"),
        ('{"sorted_candidates": [3, 1, 2]}', "3 1 2"),
        (
            '{"ranking": [{"number": 3, "position": "left"}, {"number": 1, "position": "2nd row"}]}',
            "3 1",
        ),
        ('{"ranking": [{"image": 3, "match": "85% red"}, {"image": 1, "match": "90% blue"}, {"image": 2}]}', "3 1 2"),
        (
            '[{"candidate": 1, "distance": 0.5}, {"candidate": 2, "distance": 0.8}, {"candidate": 3, "distance": 0.1}]',
            "3 1 2",
        ),
        ('{"caption": "a mug\nin red", "ranking": [3, 1, 2]}', "3 1 2"),
    ],
)
def test_a_form_is_read_whole_and_what_each_candidate_is_said_to_be_is_no_ranking(text: str, numbers: str) -> None:
    """Truth: by hand. A part of a ranking put what it lacked last, and descriptions were taken for one."""
    assert " ".join(read_answer(text).ranking) == numbers
    assert read_answer(text).caption in ("", "a mug in red")


@pytest.mark.parametrize(
    "text",
    [
        "1 -> 3\n2 -> 1\n3 -> 2",  # the place of each, or what is at each place?
        "[3] > [1]\n[1] > [2]",  # two at a time
        "3. The third\n4. 2 (red)",  # nothing is known of the first places
        '{"ranking": ["red mug", "1", "3"]}',
        "Image 1 (rank 3), Image 2 (rank 2), Image 3 (rank 1)",
        "I'm sorry, but I can't look at 2 images.",
        "I can't rank these 3 images: 1, 2, 3",
        "I cannot see the images. [1, 2, 3]",
        "The mug costs 3 dollars and was made in 2019.",
        "All 3 images are nice.",
        "2",
        "Image 1 shows a mug. Image 2 shows a cup. Image 2 fits better.",
        "1. A red mug with 3 hearts\n2. A blue mug",
        "Image 1: 3\nImage 2: 1",  # ranks, or scores?
        "I think the best is not 3.",
        "1,200 people rank it best",
        "<think>[1, 2, 3] and so on",
        '{"1": 3, "2": 1, "3": 2}',  # ranks, scores, or candidates by rank?
        '{"scores": [3, 1, 2]}',
        '{"candidates": [{"id": 2, "caption": "mug"}, {"id": 1, "caption": "cup"}]}',
        '{"price": [2, 1]}',
        '{"wanted": "2 mugs", "ranking": []}',
        '{"result": "I can\'t rank 2 images"}',
    ],
)
def test_a_number_without_proof_is_no_candidate(text: str) -> None:
    """Our choice: the order of retrieval is better than one made of prices, years and refusals."""
    assert read_answer(text).ranking == ()


def test_an_answer_may_count_from_zero() -> None:
    """Our choice: read so where every candidate is named once, and not at all where it may be one or the other."""
    assert named_labels(["2", "0", "1"], [1, 2, 3]) == ([3, 1, 2], "counted from 0")
    assert reasons_by_label(read_answer('{"ranking": [1, 0], "reasons": ["a", "b"]}'), [1, 2]) == {2: "a", 1: "b"}
    order, why = named_labels(["2", "0"], [1, 2, 3, 4])
    assert (order, why) == ([], "the numbers may count from 0 or from 1; kept the order of retrieval")


def test_reasons_beside_the_candidates_stay_with_them() -> None:
    text = '{"ranking": [{"rank": 2, "candidate": 1, "reason": "one"}, {"rank": 1, "candidate": 3, "reason": "three"}]}'
    assert reasons_by_label(read_answer(text), [1, 2, 3]) == {3: "three", 1: "one"}


def test_words_of_an_answer_are_cleaned_and_bounded() -> None:
    """Truth: by hand."""
    answer = read_answer(
        json.dumps({"Caption": " a\n mug ", "wanted": 7, "ranking": [2, 9, 1], "reasons": ["x" * 9999, "b", "c"]})
    )
    assert (answer.caption, answer.wanted) == ("a mug", "")
    assert len(answer.reasons[0]) == 1000
    assert reasons_by_label(answer, [1, 2]) == {2: "x" * 997 + "...", 1: "c"}  # the unknown number takes its own
    assert read_answer(json.dumps({"ranking": [1], "reason": "so"})).reasons == ("so",)
    assert read_answer(json.dumps({"ranking": [1], "reasons": {"1": "so"}})).reasons == ("",)


@pytest.mark.slow
def test_reading_takes_bounded_time() -> None:
    """Truth: our choice; 40,000 characters are read, whatever they are."""
    texts = ["1." + " " * 19_000 + "x" * 19_000, "\n".join(["- " + " " * 300 + "x" * 300] * 60)]
    patterns = [
        "best 1 then ",
        "image ",
        "1 > ",
        "[1] = ",
        "I cannot ",
        "<think>",
        "| 1 ",
        "order ",
        "1\n",
        "image 1: 3\n",
        "'",
        "(",
    ]
    patterns += ["[", "{", '{"ranking":[', "1,", "9", " ", "\n- 1", "rank: [", "[1", "1. ", '{"a":"', "\\", "rank "]
    for pattern in patterns:
        texts += [pattern * (9_000_000 // len(pattern)), pattern * (LONGEST_ANSWER // len(pattern)) + "x"]
    for text in texts:
        seconds = []
        for _ in range(3):  # the best of three: a pause of the machine or the collector is not the reader's
            started = time.process_time()
            named_labels(read_answer(text).ranking, range(1, 10))
            seconds.append(time.process_time() - started)
        assert min(seconds) < 0.5, text[:40]


def test_a_repair_says_what_it_repaired() -> None:
    """Truth: by hand."""
    assert named_labels(["3", "1", "2"], [1, 2, 3]) == ([3, 1, 2], "")
    assert named_labels(["3", "0", "3", "-1"], [1, 2, 3]) == ([3], "dropped 0, -1; repeated 3; appended 1, 2")
    assert repair(["3", "0", "3", "-1"], [1, 2, 3]) == ([3, 1, 2], "dropped 0, -1; repeated 3; appended 1, 2")
    assert named_labels([], [1, 2]) == ([], "appended 1, 2")
    many, repaired = named_labels([str(i) for i in range(10_000)], range(1, 100))
    assert many == list(range(1, 100))
    assert repaired == "dropped 0, 100, 101, 102, 103, 104, 105, 106 and 9893 more"
