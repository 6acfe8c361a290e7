// What the hand did: {weights, mask}. told: run it.
window.p2pHand = (value, told) => { props.value = value; if (told) trigger("input"); };
