// What the hand did: {weights, mask, photo}. told: run it.
window.p2pHand = (value, told) => { props.value = value; if (told) trigger("input"); };
