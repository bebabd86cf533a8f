"""Colours and style sheet of a report."""

from __future__ import annotations

# Okabe and Ito's colours, told apart with any colour vision; from the seventh run on, another dash.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442",
)  # fmt: skip
GREY = "#8b949e"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
THEMES = {
    "light": {"ink": "#22272e", "soft": "#626b76", "grid": "#e3e7eb", "paper": "#ffffff", "card": "#f6f8fa"},
    "dark": {"ink": "#e3e7ec", "soft": "#9aa4b0", "grid": "#303841", "paper": "#14181d", "card": "#1c2127"},
}


def _variables(look: str) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in THEMES[look].items()) + "}"


def sheet() -> str:
    """The style sheet, light or dark as the reader has it."""
    return RULES + _variables("light") + f"@media (prefers-color-scheme:dark){{{_variables('dark')}{BRIGHTER}}}"


# On dark paper: Okabe and Ito chose their blue for white.
BRIGHTER = ".plot path:not(.area),.plot circle,.strip,i:not(.box){filter:brightness(1.2)}"
RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:44px 28px 64px}
header>p:first-child{margin:0;color:var(--soft);font-size:12px;letter-spacing:.09em;text-transform:uppercase}
h1{margin:2px 0 10px;font-size:32px;line-height:1.2;font-weight:680;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{margin:56px 0 12px;font-size:20px;font-weight:680;letter-spacing:-.005em}
h3{margin:26px 0 8px;font-size:15px;font-weight:650;overflow-wrap:anywhere}
p{margin:0 0 14px;max-width:72ch;overflow-wrap:anywhere}
.lead{font-size:18px;line-height:1.6}
a{color:inherit}
h2 a{text-decoration:none}
h2 a:hover::after{content:" #";color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin:18px 0 0;font-size:14px;color:var(--soft)}
nav a{text-decoration:none;padding:4px 0}
nav a:hover{color:var(--ink);text-decoration:underline}
.note,figcaption span,footer{color:var(--soft);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:22px 0 0}
.tiles div{background:var(--card);border-radius:8px;padding:12px 16px}
.tiles b{display:block;font-size:24px;line-height:1.3;font-weight:680;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 24px 5px 0;text-align:left;border-bottom:1px solid var(--grid)}
td,thead th{text-align:right;padding:5px 0 5px 32px}
thead th{font-weight:650}
tbody th{position:sticky;left:0;background:var(--paper);font-weight:400;color:var(--soft)}
tr.section th{padding-top:18px;font-size:12px;letter-spacing:.06em;text-transform:uppercase}
.legend{display:flex;flex-wrap:wrap;gap:2px 24px;margin:0 0 16px;max-width:none;font-size:14px}
i{display:inline-block;width:18px;margin-right:8px;border-top:3px solid;vertical-align:middle}
i.box{width:12px;height:12px;border:0;border-radius:2px;vertical-align:-1px}
.parts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:0 36px;align-items:start}
.parts table{width:100%;font-size:14px}
.parts td{padding-left:16px}
.parts tbody th{white-space:normal}
.after{margin-top:32px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:36px 44px}
figure{margin:0;min-width:0}
figcaption b{display:block;font-weight:650;line-height:1.35}
.plot{display:block;width:calc(100% - 54px);height:210px;margin:14px 0 26px 54px;overflow:visible}
.plot text,.axis text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.plot path{vector-effect:non-scaling-stroke;fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.plot .faint{stroke-width:1;opacity:.3}
.plot .dotted{stroke-dasharray:2 3;stroke-width:1.5}
.plot .band{stroke:none;opacity:.22}
.plot .area{stroke:none}
.plot circle{fill:var(--paper);stroke-width:1.5}
.grid{stroke:var(--grid)}
.restart{stroke:var(--soft);stroke-dasharray:1 4}
.bars{max-width:820px;margin:14px 0 20px}
.bar{display:grid;grid-template-columns:minmax(0,190px) 1fr;gap:0 16px;align-items:center;margin:0 0 8px}
.bar>span:first-child{overflow-wrap:anywhere;line-height:1.3;font-size:14px}
.track{display:flex;height:24px;border-radius:3px;overflow:hidden}
.track.log{background:var(--card) repeating-linear-gradient(to right,var(--grid) 0 1px,transparent 1px var(--decade))}
.bar p{grid-column:2;margin:2px 0 4px;font-size:13px;color:var(--soft)}
.bar b{color:var(--ink)}
.lane{display:grid;grid-template-columns:132px 1fr;gap:0 16px;align-items:center;font-size:14px}
.lane>span:first-child{line-height:1.2;color:var(--soft);white-space:nowrap}
.strip{display:block;width:100%;height:26px;overflow:visible;border-bottom:1px solid var(--grid)}
.axis{display:block;width:100%;height:24px;overflow:visible}
.events{list-style:none;margin:8px 0 0;padding:0;font-size:14px}
.events li{display:grid;grid-template-columns:158px 100px 1fr;gap:0 14px;padding:4px 0}
.events li{border-bottom:1px solid var(--grid)}
.events li>*{min-width:0;overflow-wrap:anywhere}
.events time,.events em{color:var(--soft);font-style:normal;font-variant-numeric:tabular-nums}
code,pre{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{border-bottom:1px solid var(--grid);padding:10px 0}
summary{cursor:pointer;overflow-wrap:anywhere}
pre{margin:8px 0 0;overflow-x:auto;color:var(--soft)}
footer{margin-top:56px}
@media (max-width:640px){
main{padding:28px 18px 48px}
h1{font-size:26px}
h2{margin-top:44px}
.lead{font-size:17px}
.tiles{grid-template-columns:1fr 1fr}
.tiles b{font-size:20px}
.tiles div{padding:10px 12px}
td,thead th{padding-left:20px}
th,td{padding-right:12px}
tbody th{white-space:normal;min-width:112px}
.plot{width:calc(100% - 46px);margin-left:46px;height:190px}
.bar{grid-template-columns:minmax(0,1fr);gap:4px}
.bar p{grid-column:1}
.lane{grid-template-columns:106px 1fr;gap:0 12px;font-size:12.5px}
.events li{grid-template-columns:auto 1fr;gap:0 12px}
.events li>:last-child{grid-column:1/-1}
}
@media print{main{padding:0;max-width:none}details,nav{display:none}figure{break-inside:avoid}}
"""
