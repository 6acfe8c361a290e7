// A picture's file leaves as {name, url: a data URL} in props.value; which picture the visit has, the server says.
const drop = element.querySelector(".drop"), input = element.querySelector("input");
const said = element.querySelector(".said"), forget = element.querySelector(".forget");
const most = props.most;

window.p2pPhoto = name => { said.textContent = name; forget.hidden = !name; };
function take(file) {
  input.value = "";
  if (!file) return;
  if (file.size > most) { said.textContent = file.name + " is larger than " + (most >> 20) + " MiB; make it smaller"; return; }
  const reader = new FileReader();
  const name = new TextDecoder().decode(new TextEncoder().encode(Array.from(file.name).slice(0, 200).join("")));   // whole letters
  reader.onload = () => { props.value = {name, url: reader.result}; trigger("upload"); };
  reader.onerror = () => { said.textContent = file.name + " cannot be read"; };
  reader.readAsDataURL(file);
}
input.addEventListener("change", () => take(input.files[0]));
drop.addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", event => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); });
forget.addEventListener("click", () => trigger("clear"));
