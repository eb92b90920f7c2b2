"""Every sentence of the report, in English and Japanese."""

from collections.abc import Mapping
from typing import Literal, get_args

from psenet.errors import InputError

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

TEXT: Mapping[str, tuple[str, str]] = {
    # Frame
    "title": ("Pruning report: {model}", "枝刈り（プルーニング）レポート：{model}"),
    "subtitle": ("Data: {data}. Run: {run}.", "データ：{data}　実行ディレクトリ：{run}"),
    "contents": ("Contents", "目次"),
    "footer": (
        "Made by psenet {version} from the files of the run; nothing in this page is loaded from elsewhere.",
        "psenet {version} が実行ディレクトリのファイルから作成しました。外部から読み込むものはありません。",
    ),
    "decision": ("The decision in three lines", "結論（3 行）"),
    "unknown": ("unknown", "不明"),
    "none": ("none", "なし"),
    # The decision
    "joined": (", ", "、"),
    "sentence": ("{parts}.", "{parts}。"),
    "clause": ("; {text}", "、{text}"),
    "aside": (" ({text})", "（{text}）"),
    "unfinished": (
        "This run is not finished: it has no usable result.json, so there is no decision yet. "
        "What it left so far is shown below.",
        "この実行は完了していません。使用できる result.json がないため、まだ結論は出せません。"
        "これまでに残された内容を以下に示します。",
    ),
    "decision_macs": ("MACs {before} → {after} ({share})", "MACs {before} → {after}（{share}）"),
    "decision_latency": (
        "latency {before} → {after} ({speed}{doubt})",
        "レイテンシ {before} → {after}（{speed}{doubt}）",
    ),
    "latency_doubt": ("the quartiles overlap", "四分位範囲は重なっている"),
    "decision_accuracy": (
        "{score} {before} → {after} ({difference} points{doubt})",
        "{score} {before} → {after}（{difference} ポイント{doubt}）",
    ),
    "accuracy_overlap": (
        "the 95 % intervals overlap: these {count} samples do not tell the two apart",
        "95 % 信頼区間が重なっており、この {count} サンプルでは優劣を判定できない",
    ),
    "accuracy_apart": (
        "the 95 % intervals on {count} samples do not overlap",
        "{count} サンプルでの 95 % 信頼区間は重なっていない",
    ),
    "budget_kept": ("Budget kept: {parts}.", "予算は守られています：{parts}。"),
    "budget_missed": ("Budget missed: {parts}.", "予算を超えています：{parts}。"),
    "budget_unknown": (
        "Budget as given: {parts}; this run does not say what it comes to, so whether it is kept is not judged here.",
        "指定された予算：{parts}。この実行には予算の換算値が記録されていないため、守られているかどうかは判定しません。",
    ),
    "limit_kept": ("{cost} {amount} of at most {limit}", "{cost} {amount}（上限 {limit}）"),
    "limit_missed": ("{cost} {amount}, above {limit}", "{cost} {amount}（上限 {limit} を超過）"),
    "limit_tolerated": (
        "{cost} {amount} at a limit of {limit}, within the error of measuring",
        "{cost} {amount}（上限 {limit}、測定誤差の範囲内）",
    ),
    "kept_uniform": (
        "Kept is the uniform net: on validation data the searched one did not lead by more than a standard error",
        "採用したのは一様縮小ネットワークです。検証データで、探索結果の優位が標準誤差を上回りませんでした",
    ),
    "same_as_uniform": (
        "The search returned the uniform widths: pruned and uniform are one net.",
        "探索の結果は一様縮小と同じ幅でした。枝刈り後と一様縮小は同一のネットワークです。",
    ),
    "searched_accuracy": (
        "; the searched one has {accuracy} on {where}.",
        "（探索で得たネットワークの{where}での精度は {accuracy}）。",
    ),
    "against_uniform": (
        "Against uniform pruning within the same budget: {parts}.",
        "同じ予算での一様縮小との比較：{parts}。",
    ),
    "versus_accuracy": ("{score} {difference} points{doubt}", "{score} {difference} ポイント{doubt}"),
    "versus_cost": ("{cost} {difference}{doubt}", "{cost} {difference}{doubt}"),
    "flattered": (
        "The accuracies are on validation data, which chose the net: they flatter it.",
        "精度はネットワークの選択に使った検証データでの値のため、実際より高めに出ています。",
    ),
    # Comparison
    "compare": ("Baseline, pruned and uniform", "元のモデル・枝刈り後・一様縮小の比較"),
    "compare_lead": (
        "Uniform is the plain way to shrink: every layer by about the same factor, from the same supernet, "
        "fine-tuned by the same recipe.",
        "一様縮小は、すべての層をほぼ同じ割合で細くする単純な方法です。同じスーパーネットから取り出し、"
        "同じ手順でファインチューニングしています。",
    ),
    "metric": ("figure", "項目"),
    "baseline": ("baseline", "元のモデル"),
    "pruned": ("pruned", "枝刈り後"),
    "uniform": ("uniform", "一様縮小"),
    "macs": ("MACs", "MACs"),
    "flops": ("FLOPs", "FLOPs"),
    "params": ("parameters", "パラメータ数"),
    "weights_bytes": ("file size of the weights", "重みのファイルサイズ"),
    "memory": ("peak activation memory", "活性値のピークメモリ"),
    "latency_ms": ("latency", "レイテンシ"),
    "latency_row": ("latency, median, batch {batch}", "レイテンシ（中央値、バッチ {batch}）"),
    "quartiles": ("latency, quartiles", "レイテンシ（四分位範囲）"),
    "speed_up": ("speed-up", "高速化率"),
    "accuracy": ("accuracy", "精度"),
    "accuracy_row": ("{score} on {where}", "{score}（{where}）"),
    "interval": ("95 % interval of it", "その 95 % 信頼区間"),
    "before_finetune": ("{score} before fine-tuning", "{score}（ファインチューニング前）"),
    "test data": ("test data", "テストデータ"),
    "validation data": ("validation data", "検証データ"),
    "compare_units": (
        "One MAC is two FLOPs; MACs are those of convolutions and linear layers for one sample. The weights' "
        "file holds parameters and buffers, float32 as a rule. Memory is that of activations, weights not counted.",
        "1 MAC は 2 FLOPs です。MACs は 1 サンプルあたりの畳み込み層と線形層の値です。重みのファイルは"
        "パラメータとバッファ（通常は float32）を含みます。メモリは活性値のみで、重みは含みません。",
    ),
    "compare_latency": (
        "Latency was measured by {engine} on {device} (threads: {threads}), the nets taking turns.",
        "レイテンシは {engine}（{device}、スレッド数 {threads}）で、各ネットワークを交互に実行して測定しました。",
    ),
    "compare_interval": (
        "Intervals are Wilson's, for {count} samples. They treat the nets as if each had been tested on samples of its "
        "own; on shared samples smaller differences may be real.",
        "信頼区間は {count} サンプルに対するウィルソンの区間です。ネットワークごとに別のサンプルで評価したものとして"
        "計算しているため、同じサンプルでの比較では、より小さな差でも意味を持つことがあります。",
    ),
    "no_interval": (
        "This run does not say on how many samples the accuracies are, so they have no intervals here.",
        "この実行には精度の評価に使ったサンプル数が記録されていないため、信頼区間は示せません。",
    ),
    "no_interval_of_score": (
        "No intervals are shown of {score}: how it varies from sample to sample is not known here.",
        "{score}のサンプルごとのばらつきは分からないため、信頼区間は示せません。",
    ),
    # Front
    "front": ("Candidates and the Pareto front", "候補とパレートフロント"),
    "front_lead": (
        "{count} subnets were scored, with the supernet's weights and before any fine-tuning. The score is the mean "
        "probability of the true class on validation data. The line joins the candidates that no cheaper one equals; "
        "rest on a point to see its net, or choose a budget below.",
        "{count} 個のサブネットを、スーパーネットの重みのまま（ファインチューニング前に）評価しました。"
        "スコアは検証データでの正解クラスの平均確率です。線は、より少ない計算量で同等以上のものがない候補を"
        "結んでいます。点に触れるとネットワークの内容を、下のスライダーで予算を選べます。",
    ),
    "front_summary": (
        "Scatter of {count} candidates by MACs and score; {num_front} of them are on the front.",
        "MACs とスコアによる {count} 個の候補の散布図。うち {num_front} 個がフロント上にあります。",
    ),
    "candidates": ("candidates", "候補"),
    "front_line": ("front", "フロント"),
    "winner": ("best score", "最高スコア"),
    "kept": ("kept", "採用"),
    "picked": ("your pick", "選択中"),
    "macs_axis": ("MACs, % of the full model", "MACs（元のモデルに対する %）"),
    "score": ("score", "スコア"),
    "estimate": (
        "an estimate: hopeless after {share} of the validation data",
        "推定値：検証データの {share} で見込みなしと判断",
    ),
    "score_axis": ("score, %", "スコア（%）"),
    "slider": ("Budget: at most so much of the MACs", "予算：MACs の上限"),
    "group": ("channel group", "チャネルグループ"),
    "width": ("width", "幅"),
    "share_kept": ("kept", "残す割合"),
    "latency_predicted": ("predicted latency", "予測レイテンシ"),
    "no_candidates": ("No scored candidates are there to show.", "表示できる候補がありません。"),
    # Widths
    "widths": ("Widths per layer, before and after", "層ごとの幅（枝刈り前後）"),
    "widths_lead": (
        "Output channels of every convolution and linear layer.",
        "すべての畳み込み層と線形層の出力チャネル数です。",
    ),
    "groups_lead": (
        "Widths by channel group: layers that keep the same channels. This run does not keep single layers.",
        "チャネルグループ（同じチャネルを共有する層の集まり）ごとの幅です。この実行には層ごとの記録がありません。",
    ),
    "layer": ("layer", "層"),
    "kind": ("kind", "種類"),
    "before": ("before", "枝刈り前"),
    "after": ("after", "枝刈り後"),
    "show_layers": ("Show all {count} layers", "全 {count} 層を表示"),
    "no_widths": ("The run does not say its widths yet.", "幅はまだ記録されていません。"),
    # Curves
    "curves": ("Training curves", "学習曲線"),
    "curves_lead": (
        "Mean training loss of each epoch. The losses of different trainings are not comparable where they distil or "
        "train many subnets at once.",
        "各エポックの平均学習損失です。蒸留を使う学習や、多数のサブネットを同時に学習する場合の損失は、"
        "ほかの学習の損失と直接比較できません。",
    ),
    "curves_summary": ("Training loss over epochs: {names}.", "エポックごとの学習損失：{names}。"),
    "training": ("training", "学習"),
    "epochs": ("epochs", "エポック数"),
    "epoch_axis": ("epoch", "エポック"),
    "loss_axis": ("mean loss", "平均損失"),
    "first_loss": ("first loss", "最初の損失"),
    "last_loss": ("last loss", "最後の損失"),
    "seconds": ("seconds", "秒"),
    "training_baseline": ("baseline", "元のモデル"),
    "training_supernet": ("supernet", "スーパーネット"),
    "training_searched": ("fine-tuning, searched", "ファインチューニング（探索結果）"),
    "training_uniform": ("fine-tuning, uniform", "ファインチューニング（一様縮小）"),
    "no_curves": ("No training curves are there to show.", "表示できる学習曲線がありません。"),
    "loss_hover": ("epoch {epoch}: loss {loss}, learning rate {rate}", "エポック {epoch}：損失 {loss}、学習率 {rate}"),
    # Prior
    "prior": ("What the prior learned", "事前分布が学んだこと"),
    "prior_lead": (
        "The losses of supernet training say which channel groups are worth their cost; the search starts from that. "
        "Blue groups keep more channels there than in the subnets that training visited, red ones fewer.",
        "スーパーネットの学習中の損失から、どのチャネルグループがコストに見合うかを推定し、探索の出発点にしています。"
        "青は学習中に現れたサブネットより多くのチャネルを残すグループ、赤は少ないグループです。",
    ),
    "prior_groups_lead": (
        "Blue groups keep more channels there than the mean group, red ones fewer.",
        "青は平均的なグループより多くのチャネルを残すグループ、赤は少ないグループです。",
    ),
    "prior_summary": (
        "Heat map of {count} channel groups over the cost of the net; the table below has the largest values "
        "near {share} of the MACs.",
        "{count} 個のチャネルグループを計算量に対して示したヒートマップ。下の表は MACs {share} 付近の大きな値です。",
    ),
    "prior_axis": ("MACs, share of the full model", "MACs（元のモデルに対する割合）"),
    "prior_cell": (
        "keeps {keeps} on average; likeliest widths: {widths}",
        "平均で {keeps} を残す。可能性の高い幅：{widths}",
    ),
    "prior_at": ("%{{y}} at %{{x}} of the MACs", "%{{y}}（MACs %{{x}}）"),
    "prior_table": (
        "The groups that differ most near {share} of the MACs:",
        "MACs {share} 付近で差の大きいグループ：",
    ),
    "prior_keeps": ("keeps", "残す割合"),
    "prior_usual": ("compared with", "比較の基準"),
    "prior_difference": ("difference, points", "差（ポイント）"),
    "no_prior": ("What the prior learned was not kept.", "事前分布の記録がありません。"),
    # Ranking
    "ranking": ("Does the supernet rank subnets rightly?", "スーパーネットの順位づけの正しさ"),
    "ranking_lead": (
        "{count} subnets were also trained alone. Kendall's τ between their scores in the supernet and their "
        "accuracies alone is {tau}: 1 is the same order, 0 none in common.",
        "{count} 個のサブネットを単独でも学習しました。スーパーネットでのスコアと単独での精度の間の"
        "ケンドールの τ は {tau} です（1 は完全に同じ順位、0 は無関係）。",
    ),
    "ranking_macs": (
        "Ranking them by MACs alone has a τ of {tau}.",
        "MACs だけで順位をつけた場合の τ は {tau} です。",
    ),
    "ranking_summary": (
        "Scatter of {count} subnets: score in the supernet and accuracy alone.",
        "{count} 個のサブネットの散布図：スーパーネットでのスコアと単独での精度。",
    ),
    "accuracy_alone": ("accuracy trained alone, %", "単独で学習したときの精度（%）"),
    # Frozen
    "frozen": ("What was frozen, and why", "幅を変えられなかった層とその理由"),
    "frozen_lead": (
        "Layers that keep their output width: {count}. The reasons are those of the program that read the model.",
        "{count} 個の層は出力幅を変えていません。理由はモデルを解析したプログラムの出力（英語）のままです。",
    ),
    "frozen_none": ("No layer was frozen.", "幅を固定された層はありません。"),
    "frozen_unknown": ("This run does not say what was frozen.", "この実行には固定された層の記録がありません。"),
    "macs_share": ("share of MACs", "MACs の割合"),
    "reason": ("why", "理由"),
    # Return
    "return": ("Return", "費用対効果"),
    "return_lead": (
        "From the figures given. Requests are served one after the other, and a machine is paid for the time it "
        "computes; a month has {days} days. Latency is that of the comparison above, "
        "for one sample of a batch of {batch}.",
        "与えられた数値による計算です。リクエストは 1 件ずつ順に処理し、計算した時間だけ料金がかかるものとします。"
        "1 か月は {days} 日です。レイテンシは上の比較の値（バッチ {batch} の 1 サンプルあたり）です。",
    ),
    "return_ask": (
        "No figures of cost were given, and none are invented. This adds savings, cost and pay-back time:",
        "費用に関する数値が与えられていません（推測値は使いません）。次のコマンドで、節約額・費用・回収期間を追加できます：",
    ),
    "step": ("step", "項目"),
    "formula": ("formula, numbers put in", "計算式（数値を代入）"),
    "value": ("value", "値"),
    "hours_baseline": (
        "machine-hours a month, baseline: requests a day × days × latency",
        "1 か月の機械時間（元のモデル）：1 日のリクエスト数 × 日数 × レイテンシ",
    ),
    "hours_pruned": (
        "machine-hours a month, pruned: requests a day × days × latency",
        "1 か月の機械時間（枝刈り後）：1 日のリクエスト数 × 日数 × レイテンシ",
    ),
    "savings": (
        "savings a month: difference in hours × price of an hour",
        "1 か月の節約額：時間の差 × 1 時間の料金",
    ),
    "machine_cost": (
        "machine cost of the run: its hours × price of an hour",
        "この実行の機械費用：所要時間 × 1 時間の料金",
    ),
    "engineering_cost": ("engineering: hours × rate", "人件費：作業時間 × 時間単価"),
    "run_cost": ("cost of the run: machine + engineering", "この実行の総費用：機械費用 + 人件費"),
    "payback": ("pay-back time: cost ÷ savings a month", "回収期間：総費用 ÷ 1 か月の節約額"),
    "needs": ("needs {figures}", "{figures} が必要です"),
    "never": ("never: by these figures nothing is saved", "回収できません：この数値では節約になりません"),
    "unit_hours": ("{value} h", "{value} 時間"),
    "unit_months": ("{value} months", "{value} か月"),
    "no_currency": ("Amounts are in the currency of the figures given.", "金額の単位は与えられた数値の通貨です。"),
    "figure_price_per_hour": ("--price-per-hour", "--price-per-hour"),
    "figure_requests_per_day": ("--requests-per-day", "--requests-per-day"),
    "figure_engineering_hours": ("--engineering-hours", "--engineering-hours"),
    "figure_engineering_rate": ("--engineering-rate", "--engineering-rate"),
    "figure_latency_baseline": ("the baseline's latency", "元のモデルのレイテンシ"),
    "figure_latency_pruned": ("the pruned net's latency", "枝刈り後のレイテンシ"),
    "figure_run_hours": ("the hours of the run", "実行の所要時間"),
    # Provenance
    "provenance": ("Provenance", "来歴"),
    "what": ("what", "項目"),
    "command": ("command", "コマンド"),
    "from_python": ("started from a Python program", "Python プログラムから実行"),
    "model": ("model", "モデル"),
    "data": ("data", "データ"),
    "budget": ("budget", "予算"),
    "seed": ("seed", "乱数シード"),
    "finished_at": ("finished", "完了日時"),
    "versions": ("versions", "バージョン"),
    "hardware": ("hardware", "ハードウェア"),
    "time": ("time", "所要時間"),
    "stage_baseline": ("baseline {time}", "元のモデル {time}"),
    "stage_supernet": ("supernet {time}", "スーパーネット {time}"),
    "stage_search": ("search {time}", "探索 {time}"),
    "stage_finetune": ("fine-tuning {time}", "ファインチューニング {time}"),
    "stage_total": ("total {time}", "合計 {time}"),
    "exported": ("exported files", "出力ファイル"),
    "settings": ("All settings", "すべての設定"),
    "setting": ("setting", "設定"),
    # Missing
    "missing": ("What is not here", "このレポートにないもの"),
    "missing_lead": (
        "These pieces of the run could not be shown; everything else is.",
        "実行ディレクトリのうち、次の部分は表示できませんでした。それ以外はすべて表示しています。",
    ),
    "file": ("file", "ファイル"),
    "absent": ("not there", "存在しません"),
}
"""By key, the sentence in each of `LANGUAGES`; names in braces are filled in."""


class Words:
    """The sentences of one language.

    Args:
        language: `"en"` or `"ja"`.

    Raises:
        InputError: There is no such language.

    Example:
        >>> Words("en")("unit_hours", value="3")
        '3 h'
    """

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise InputError(f"the report's language must be one of {', '.join(LANGUAGES)}; got {language!r}")
        self.language = language
        self._place = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        """Return a sentence, filled in."""
        return TEXT[key][self._place].format(**values)
